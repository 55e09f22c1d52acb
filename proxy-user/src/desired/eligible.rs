//! Which endpoints a Service port has, and which of them take new flows.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use super::{Backend, PortId};
use crate::model::{Cluster, Endpoint, EndpointPort, Node, Slice};

/// The endpoints of a Service port, out of all slices of its Service (KP-9, 13, 15), sorted.
///
/// Usable are the ready ones that the topology hints leave; if none is ready, those that still serve
/// while they terminate (KP-49, 62). The same is decided for this node's endpoints alone (KP-63), where
/// hints do not count (KP-67). There may be a hundred thousand: each is looked at twice. Also says by what
/// they were judged.
pub fn backends(cluster: &Cluster, node: &Node, id: &PortId) -> (Vec<Backend>, Criteria) {
    let merged = merged(cluster, id);
    let criteria = Criteria::of(&merged.iter().map(|(_, endpoint)| *endpoint), node);
    let backends = merged.iter().map(|(address, e)| criteria.judge(*address, e, node));
    let mut backends: Vec<Backend> = backends.collect();
    if criteria.any_weightless {
        spare_weightless(&mut backends, |backend| &mut backend.usable);
        spare_weightless(&mut backends, |backend| &mut backend.usable_local);
    }
    backends.retain(is_of_use);
    (backends, criteria)
}

/// The same of the endpoints at some addresses alone, if all others are judged as they were by `criteria`; `None`
/// if not, or if only a look at all of them tells.
pub fn backends_at(
    cluster: &Cluster,
    node: &Node,
    id: &PortId,
    criteria: Criteria,
    addresses: &BTreeSet<IpAddr>,
) -> Option<Vec<Backend>> {
    if criteria.any_weightless || cluster.repeats_addresses(&id.service) {
        return None;
    }
    let slices = cluster.slices(&id.service).filter(|slice| !ports(slice, id).is_empty());
    if Criteria::of(&slices.flat_map(|slice| &slice.endpoints), node) != criteria {
        return None;
    }
    let mut backends = Vec::with_capacity(addresses.len());
    for (slice, endpoint) in addresses.iter().flat_map(|a| cluster.endpoints_at(&id.service, *a)) {
        let addresses = ports(slice, id).into_iter().map(|p| SocketAddr::new(endpoint.address, p));
        backends.extend(addresses.map(|address| criteria.judge(address, endpoint, node)));
    }
    backends.sort_unstable();
    backends.dedup();
    backends.retain(is_of_use);
    Some(backends)
}

/// Whether a backend takes new flows or keeps old ones.
const fn is_of_use(backend: &Backend) -> bool {
    backend.usable || backend.usable_local || backend.serving
}

/// What is so of a Service port's endpoints together: each is judged by it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Criteria {
    any_ready: bool,
    /// Of this node's.
    local_ready: bool,
    any_weightless: bool,
    topology: Topology,
}

impl Criteria {
    fn of<'a>(endpoints: &(impl Iterator<Item = &'a Endpoint> + Clone), node: &Node) -> Self {
        let (mut any_ready, mut local_ready, mut any_weightless) = (false, false, false);
        let mut all_hinted = true;
        for endpoint in endpoints.clone() {
            any_ready |= endpoint.ready;
            local_ready |= endpoint.ready && endpoint.local;
            any_weightless |= endpoint.weight == 0;
            all_hinted &= !endpoint.ready || endpoint.hints.is_some();
        }
        let topology = if all_hinted { Topology::of(endpoints, node) } else { Topology::Cluster };
        Self { any_ready, local_ready, any_weightless, topology }
    }

    fn judge(self, address: SocketAddr, endpoint: &Endpoint, node: &Node) -> Backend {
        let serves = |any_ready: bool| {
            if any_ready { endpoint.ready } else { endpoint.serving && endpoint.terminating }
        };
        let is_meant = !self.any_ready || self.topology.takes(endpoint, node);
        Backend {
            address,
            usable: serves(self.any_ready) && is_meant,
            usable_local: endpoint.local && serves(self.local_ready),
            serving: endpoint.serving || endpoint.ready,
            local: endpoint.local,
            weight: endpoint.weight,
        }
    }
}

/// Whoever has weight 0 takes no new flows, unless there is no one else.
fn spare_weightless(backends: &mut [Backend], usable: impl Fn(&mut Backend) -> &mut bool) {
    if backends.iter_mut().any(|backend| *usable(backend) && backend.weight > 0) {
        for backend in backends.iter_mut().filter(|backend| backend.weight == 0) {
            *usable(backend) = false;
        }
    }
}

/// Which endpoints the hints leave.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
enum Topology {
    /// All.
    #[default]
    Cluster,
    /// Those for this node's zone.
    Zone,
    /// Those for this node.
    Node,
}

impl Topology {
    /// Hints count only if every ready endpoint has some and one of them is for here: first nodes, then
    /// zones (KP-65, 66).
    fn of<'a>(endpoints: &(impl Iterator<Item = &'a Endpoint> + Clone), node: &Node) -> Self {
        let decides = |hints: fn(&Endpoint) -> &[String], here: &str| {
            let mut ready = endpoints.clone().filter(|endpoint| endpoint.ready);
            ready.clone().all(|endpoint| !hints(endpoint).is_empty())
                && ready.any(|endpoint| hints(endpoint).iter().any(|name| name == here))
        };
        if decides(Endpoint::nodes, &node.name) {
            return Self::Node;
        }
        match &node.zone {
            Some(zone) if decides(Endpoint::zones, zone) => Self::Zone,
            _ => Self::Cluster,
        }
    }

    fn takes(self, endpoint: &Endpoint, node: &Node) -> bool {
        match self {
            Self::Cluster => true,
            Self::Zone => endpoint.zones().iter().any(|zone| Some(zone) == node.zone.as_ref()),
            Self::Node => endpoint.nodes().contains(&node.name),
        }
    }
}

/// The endpoints of a Service port, each address once, sorted.
fn merged<'a>(cluster: &'a Cluster, id: &PortId) -> Vec<(SocketAddr, &'a Endpoint)> {
    let mut merged = Vec::with_capacity(cluster.endpoints(&id.service));
    cluster.for_each_endpoint(
        &id.service,
        |slice| ports(slice, id),
        |ports, endpoint| {
            for port in ports {
                merge(&mut merged, SocketAddr::new(endpoint.address, *port), endpoint);
            }
        },
    );
    merged
}

/// Puts an endpoint in its place among the others. They come in the order of their addresses, so that it is at
/// the end, or near to it.
fn merge<'a>(
    merged: &mut Vec<(SocketAddr, &'a Endpoint)>,
    address: SocketAddr,
    endpoint: &'a Endpoint,
) {
    if merged.last().is_none_or(|(last, _)| *last < address) {
        merged.push((address, endpoint));
        return;
    }
    let before = merged.iter().rposition(|(known, _)| *known <= address);
    match before.map(|at| &mut merged[at]) {
        Some((known, first)) if *known == address => {
            if replaces(endpoint, first) {
                *first = endpoint;
            }
        }
        _ => merged.insert(before.map_or(0, |at| at + 1), (address, endpoint)),
    }
}

/// The endpoints' ports for the Service's port of that name, protocol and family (KP-9).
fn ports(slice: &Slice, id: &PortId) -> Vec<u16> {
    let is_it = |port: &&EndpointPort| {
        slice.family == id.family && port.name == id.port && port.protocol == id.protocol
    };
    slice.ports.iter().filter(is_it).map(|port| port.port).collect()
}

/// Which of two endpoints at one address counts: one that goes away never replaces one that stays
/// (KP-14). Where kube-proxy leaves the rest to chance, the ready one counts, then the later slice.
fn replaces(new: &Endpoint, known: &Endpoint) -> bool {
    match (new.terminating, known.terminating) {
        (true, false) => false,
        (false, true) => true,
        _ => new.ready || !known.ready,
    }
}
