//! The cluster as plain facts: what the objects say, checked, with every default decided.
//!
//! Kubernetes types end in [`from_k8s`]; everything behind it works on these structs. No I/O, no
//! clock, no client.

pub mod from_k8s;
mod pods;
mod slices;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use proxy_common::proto;
use proxy_common::tables::Algorithm;

use slices::Slices;

/// An object's namespace and name. Copies share the text: there are many of each.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectName {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// The name of an object in a namespace.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// An address family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The family's unspecified address.
    pub const fn any(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }
}

/// A transport protocol that Services know.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// The protocol's number in packets and maps.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => proto::TCP,
            Self::Udp => proto::UDP,
            Self::Sctp => proto::SCTP,
        }
    }

    /// The protocol of a number in packets and maps.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            proto::TCP => Some(Self::Tcp),
            proto::UDP => Some(Self::Udp),
            proto::SCTP => Some(Self::Sctp),
            _ => None,
        }
    }
}

/// A Service that is proxied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Its UID, for Events about it.
    pub uid: String,
    /// When it was created (RFC 3339 sorts as text); of two that claim one frontend the older wins.
    pub created: String,
    /// Its cluster IPs, at most one per family (KP-19).
    pub cluster_ips: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Its external IPs, of both families (KP-37).
    pub external_ips: Vec<IpAddr>,
    /// The IPs that its load balancer gave it, in mode VIP (KP-38, KP-39).
    pub balancer_ips: Vec<IpAddr>,
    /// Only endpoints of the node that is asked by pods and by itself (KP-59).
    pub internal_local: bool,
    /// Only endpoints of the node that is asked from outside (KP-52).
    pub external_local: bool,
    /// For how many seconds a client stays with its endpoint, if it does (KP-95, KP-96).
    pub affinity: Option<u32>,
    /// How it chooses an endpoint, if it says so.
    pub algorithm: Option<Algorithm>,
    /// Who may ask the load balancer's IPs; everyone if there are none of a family (KP-93).
    pub source_ranges: Vec<IpNet>,
    /// Where the load balancer asks whether this node has endpoints (KP-101).
    pub health_check_port: Option<u16>,
}

/// A Service's port.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServicePort {
    /// Its name; empty if it has none.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number.
    pub port: u16,
    /// The port of every node that leads to it, if any.
    pub node_port: Option<u16>,
}

/// An endpoint's port.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct EndpointPort {
    /// The name of the Service's port that it is for.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number.
    pub port: u16,
}

/// An `EndpointSlice` of a family that is proxied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slice {
    /// The Service that it belongs to (KP-7).
    pub service: ObjectName,
    /// The family of its addresses.
    pub family: IpFamily,
    /// Its ports; those without a number are left out (KP-9).
    pub ports: Vec<EndpointPort>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// An endpoint, its conditions resolved (KP-11).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts, each with a name")]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// Accepts new flows.
    pub ready: bool,
    /// Answers.
    pub serving: bool,
    /// Is going away.
    pub terminating: bool,
    /// Is said to run on this node (KP-12).
    pub named_here: bool,
    /// Runs on this node: it is said so, or its address is one of the node's own. Hand-made slices name no node, nor does
    /// that of `default/kubernetes`.
    pub local: bool,
    /// Its share of new flows, beside those of others; 0: none.
    pub weight: u16,
    /// For whom it is meant, if that was said.
    pub hints: Option<Box<Hints>>,
}

impl Endpoint {
    /// The zones that it is meant for (KP-65).
    pub fn zones(&self) -> &[String] {
        self.hints.as_ref().map_or(&[], |hints| &hints.zones)
    }

    /// The nodes that it is meant for (KP-66).
    pub fn nodes(&self) -> &[String] {
        self.hints.as_ref().map_or(&[], |hints| &hints.nodes)
    }
}

/// For whom an endpoint is meant.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Hints {
    /// The zones.
    pub zones: Vec<String>,
    /// The nodes.
    pub nodes: Vec<String>,
}

/// A pod of this node that has ports of the node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pod {
    /// Its UID, for Events about it.
    pub uid: String,
    /// When it was created.
    pub created: String,
    /// Its addresses, at most one per family.
    pub addresses: Vec<IpAddr>,
    /// Its ports of the node.
    pub host_ports: Vec<HostPort>,
}

/// A port of the node that leads to a pod.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostPort {
    /// The node's address that has it; all if there is none, all of a family if it is unspecified.
    pub address: Option<IpAddr>,
    /// Its number.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
    /// The pod's port.
    pub target: u16,
}

/// An object that has frontends.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Owner {
    /// A Service.
    Service(ObjectName),
    /// A pod, by its host ports.
    Pod(ObjectName),
}

/// The Services that a change of a slice concerns, with the addresses of the endpoints that are others now.
pub type Concerned = Vec<(ObjectName, BTreeSet<IpAddr>)>;

/// Everything known of the cluster.
#[derive(Clone, Default, Debug)]
pub struct Cluster {
    services: BTreeMap<ObjectName, Service>,
    /// By Service.
    slices: BTreeMap<ObjectName, Slices>,
    /// The Service that each slice belongs to, for slices that change their label or are deleted.
    owners: BTreeMap<ObjectName, ObjectName>,
    /// The pods of this node that have ports of the node.
    pods: BTreeMap<ObjectName, Pod>,
    /// The node's own addresses.
    own: BTreeSet<IpAddr>,
}

impl Cluster {
    /// Puts a Service in the place of the one of that name; `None` removes it. Says whether anything
    /// changed (KP-22).
    pub fn set_service(&mut self, name: &ObjectName, service: Option<Service>) -> bool {
        if self.services.get(name) == service.as_ref() {
            return false;
        }
        match service {
            Some(service) => self.services.insert(name.clone(), service),
            None => self.services.remove(name),
        };
        true
    }

    /// Puts a slice in the place of the one of that name; `None` removes it. Returns the Services that
    /// this concerns: one, or two if the slice has moved.
    pub fn set_slice(&mut self, name: &ObjectName, mut slice: Option<Slice>) -> Concerned {
        let mut concerned = Concerned::new();
        for endpoint in slice.iter_mut().flat_map(|slice| &mut slice.endpoints) {
            endpoint.local = endpoint.named_here || self.own.contains(&endpoint.address);
        }
        let owner = slice.as_ref().map(|slice| slice.service.clone());
        let before = self.owners.get(name).cloned();
        if before.is_some() && before != owner {
            concerned.extend(self.take_slice(name));
        }
        if let (Some(owner), Some(slice)) = (owner, slice) {
            let slices = self.slices.entry(owner.clone()).or_default();
            let before = slices.get(&name.name);
            if before != Some(&slice) {
                concerned.push((owner.clone(), slices::changed(before, &slice)));
                slices.set(&name.name, slice);
            }
            self.owners.insert(name.clone(), owner);
        }
        concerned
    }

    /// Takes in which addresses are the node's own. Returns the Services that this concerns.
    pub fn set_own(&mut self, own: &BTreeSet<IpAddr>) -> Concerned {
        let changed: BTreeSet<IpAddr> = &self.own ^ own;
        self.own.clone_from(own);
        let mut concerned = Concerned::new();
        for (service, slices) in &mut self.slices {
            let moved = changed.iter().filter(|address| slices.move_to(**address, own));
            let moved: BTreeSet<IpAddr> = moved.copied().collect();
            if !moved.is_empty() {
                concerned.push((service.clone(), moved));
            }
        }
        concerned
    }

    fn take_slice(&mut self, name: &ObjectName) -> Option<(ObjectName, BTreeSet<IpAddr>)> {
        let owner = self.owners.remove(name)?;
        let slices = self.slices.get_mut(&owner)?;
        let slice = slices.remove(&name.name)?;
        if slices.is_empty() {
            self.slices.remove(&owner);
        }
        Some((owner, slices::addresses(&slice)))
    }

    /// The Service of that name.
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name)
    }

    /// The slices of the Service of that name, in the order of their names.
    pub fn slices(&self, service: &ObjectName) -> impl Iterator<Item = &Slice> + Clone {
        self.slices.get(service).into_iter().flat_map(Slices::iter)
    }

    /// How many endpoints the Service of that name has, in all slices.
    pub fn endpoints(&self, service: &ObjectName) -> usize {
        self.slices.get(service).map_or(0, Slices::endpoints)
    }

    /// The endpoints at an address of the Service of that name, each with its slice, in the order of the names of
    /// those.
    pub fn endpoints_at(
        &self,
        service: &ObjectName,
        address: IpAddr,
    ) -> impl Iterator<Item = (&Slice, &Endpoint)> {
        self.slices.get(service).into_iter().flat_map(move |slices| slices.at(address))
    }

    /// Whether endpoints of the Service of that name have one address.
    pub fn repeats_addresses(&self, service: &ObjectName) -> bool {
        self.slices.get(service).is_some_and(Slices::repeats_addresses)
    }

    /// Hands all endpoints of the Service of that name to `each`, in the order of their addresses; those at one
    /// address in the order of the names of their slices. With each comes what was made of its slice.
    pub fn for_each_endpoint<'a, T>(
        &'a self,
        service: &ObjectName,
        of_slice: impl Fn(&Slice) -> T,
        each: impl FnMut(&T, &'a Endpoint),
    ) {
        if let Some(slices) = self.slices.get(service) {
            slices.for_each(of_slice, each);
        }
    }

    /// How many Services there are.
    pub fn services(&self) -> usize {
        self.services.len()
    }

    /// The names of all Services.
    pub fn service_names(&self) -> impl Iterator<Item = &ObjectName> {
        self.services.keys()
    }

    /// Puts a pod in the place of the one of that name; `None` removes it. Says whether anything changed.
    pub fn set_pod(&mut self, name: &ObjectName, pod: Option<Pod>) -> bool {
        if self.pods.get(name) == pod.as_ref() {
            return false;
        }
        match pod {
            Some(pod) => self.pods.insert(name.clone(), pod),
            None => self.pods.remove(name),
        };
        true
    }

    /// The pod of that name.
    pub fn pod(&self, name: &ObjectName) -> Option<&Pod> {
        self.pods.get(name)
    }

    /// The names of all pods with ports of the node.
    pub fn pod_names(&self) -> impl Iterator<Item = &ObjectName> {
        self.pods.keys()
    }

    /// All that has frontends.
    pub fn owners(&self) -> impl Iterator<Item = Owner> {
        let services = self.services.keys().cloned().map(Owner::Service);
        services.chain(self.pods.keys().cloned().map(Owner::Pod))
    }

    /// The names of all slices.
    pub fn slice_names(&self) -> impl Iterator<Item = &ObjectName> {
        self.owners.keys()
    }
}

/// What the agent knows of its own node.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Node {
    /// The node's name, as endpoints carry it (KP-139).
    pub name: String,
    /// How its agent chooses backends for Services that do not say.
    pub algorithm: Algorithm,
    /// Its zone.
    pub zone: Option<String>,
    /// It is going away, so load balancers are to send nothing more here (KP-118).
    pub leaving: bool,
    /// Its primary addresses, at most one per family: internal before external ones (KP-140).
    pub addresses: Vec<IpAddr>,
}
