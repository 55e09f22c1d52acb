//! From Kubernetes objects to facts: every `Option` is decided here, once, and every malformed field
//! is reported by the object's name while the rest of the object counts.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use proxy_common::tables::Algorithm;

pub use super::pods::pod;
use super::{
    Endpoint, EndpointPort, Hints, IpFamily, Node, ObjectName, Protocol, Service, ServicePort,
    Slice,
};
use crate::watch::raw;

/// A Service with this label is another proxy's (KP-3).
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// A slice with this label is not to be seen (KP-6).
const HEADLESS: &str = "service.kubernetes.io/headless";
/// The label that ties a slice to its Service (KP-7).
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The label that names a node's zone (KP-65).
const ZONE: &str = "topology.kubernetes.io/zone";

/// How a Service chooses an endpoint.
const ALGORITHM: &str = "portal.dev/lb-algorithm";
/// The weights of a slice's endpoints, as in `10.0.0.1=3,10.0.0.2=1`. Whoever is not named has 1.
const WEIGHTS: &str = "portal.dev/weights";
/// The greatest weight.
const HEAVIEST: u16 = 1000;

/// The taint of a node that the cluster autoscaler is about to remove (KP-118).
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// Something in an object that can't be used, in words for the operator.
pub type Problem = String;

/// The Service that the object describes; `None` if it is not one to proxy (KP-3 to 5).
pub fn service(raw: &raw::Service, problems: &mut Vec<Problem>) -> Option<Service> {
    let spec = &raw.spec;
    if raw.metadata.labels.contains_key(PROXY_NAME)
        || spec.r#type == "ExternalName"
        || spec.cluster_ip.is_empty()
        || spec.cluster_ip == "None"
    {
        return None;
    }
    let external_ips = addresses("external IP", &spec.external_ips, problems);
    let external_local = spec.external_traffic_policy == "Local"
        && (matches!(spec.r#type.as_str(), "LoadBalancer" | "NodePort")
            || !external_ips.is_empty());
    let is_checked = external_local && spec.r#type == "LoadBalancer";
    Some(Service {
        uid: raw.metadata.uid.clone(),
        created: raw.metadata.creation_timestamp.clone(),
        cluster_ips: kept(cluster_ips(spec, problems)),
        ports: kept(spec.ports.iter().filter_map(|port| service_port(port, problems))),
        external_ips,
        balancer_ips: balancer_ips(&raw.status, problems),
        internal_local: spec.internal_traffic_policy == "Local",
        external_local,
        affinity: affinity(spec),
        algorithm: algorithm(&raw.metadata, problems),
        source_ranges: source_ranges(spec, problems),
        health_check_port: port_number(spec.health_check_node_port).filter(|_| is_checked),
    })
}

/// A list that takes up no more memory than it must: there are many.
fn kept<T>(items: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut list: Vec<T> = items.into_iter().collect();
    list.shrink_to_fit();
    list
}

/// The addresses in a list, without those that are none.
fn addresses(what: &str, list: &[String], problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for text in list {
        match parse_address(text) {
            Some(address) if !found.contains(&address) => found.push(address),
            Some(_) => {}
            None => problems.push(format!("{what} \"{text}\" is no IP address; it is left out")),
        }
    }
    found
}

/// Mode Proxy means that packets go out to the load balancer (KP-39); no mode means VIP.
fn balancer_ips(status: &raw::ServiceStatus, problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    let ingress = &status.load_balancer.ingress;
    let vips = ingress.iter().filter(|i| !i.ip.is_empty() && i.ip_mode != "Proxy");
    let list: Vec<String> = vips.map(|ingress| ingress.ip.clone()).collect();
    addresses("load balancer IP", &list, problems)
}

/// The API's default is three hours (KP-96).
fn affinity(spec: &raw::ServiceSpec) -> Option<u32> {
    let seconds = spec.session_affinity_config.client_ip.timeout_seconds.unwrap_or(10_800);
    let seconds = u32::try_from(seconds).ok().filter(|seconds| *seconds > 0).unwrap_or(10_800);
    (spec.session_affinity == "ClientIP").then_some(seconds)
}

fn algorithm(meta: &raw::Meta, problems: &mut Vec<Problem>) -> Option<Algorithm> {
    let name = meta.annotations.get(ALGORITHM)?;
    let found = Algorithm::ALL.into_iter().find(|algorithm| algorithm.label() == name);
    if found.is_none() {
        let known = Algorithm::ALL.map(Algorithm::label).join(", ");
        problems.push(format!("annotation {ALGORITHM}: \"{name}\" is not one of {known}; ignored"));
    }
    found
}

/// The weights of a slice's endpoints, without those that can't be read.
fn weights(meta: &raw::Meta, problems: &mut Vec<Problem>) -> HashMap<IpAddr, u16> {
    let mut found = HashMap::new();
    let text = meta.annotations.get(WEIGHTS).map(String::as_str).unwrap_or_default();
    for entry in text.split(',').filter(|entry| !entry.trim().is_empty()) {
        let weight = entry.split_once('=').and_then(|(address, weight)| {
            let weight: u16 = weight.trim().parse().ok()?;
            Some((parse_address(address)?, weight)).filter(|(_, weight)| *weight <= HEAVIEST)
        });
        match weight {
            Some((address, weight)) => drop(found.insert(address, weight)),
            None => problems.push(format!(
                "annotation {WEIGHTS}: \"{entry}\" is not ADDRESS=WEIGHT with a weight up to \
                 {HEAVIEST}; left out"
            )),
        }
    }
    found
}

fn source_ranges(spec: &raw::ServiceSpec, problems: &mut Vec<Problem>) -> Vec<IpNet> {
    let mut found = Vec::new();
    for text in &spec.load_balancer_source_ranges {
        match parse_range(text) {
            Some(range) => found.push(range),
            None => problems.push(format!("source range \"{text}\" is no CIDR; it is left out")),
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// A CIDR, sloppy ones included (KP-21).
pub fn parse_range(text: &str) -> Option<IpNet> {
    let (address, prefix) = text.trim().split_once('/')?;
    let net = IpNet::new(parse_address(address)?, prefix.trim().parse().ok()?).ok()?;
    Some(net.trunc())
}

/// What the object says of the agent's own node.
pub fn node(raw: &raw::Node) -> Node {
    let of_type = |wanted: &str| -> Vec<IpAddr> {
        let listed = raw.status.addresses.iter().filter(|address| address.r#type == wanted);
        listed.filter_map(|address| parse_address(&address.address)).collect()
    };
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in of_type("InternalIP").into_iter().chain(of_type("ExternalIP")) {
        if addresses.iter().all(|known| IpFamily::of(*known) != IpFamily::of(address)) {
            addresses.push(address);
        }
    }
    let zone = raw.metadata.labels.get(ZONE).filter(|zone| !zone.is_empty()).cloned();
    let leaving = raw.metadata.deletion_timestamp.is_some()
        || raw.spec.taints.iter().any(|taint| taint.key == TO_BE_DELETED);
    Node { name: raw.metadata.name.clone(), zone, leaving, addresses, ..Node::default() }
}

/// The cluster IPs, the first of each family. `clusterIPs` counts; a Service that has none, from
/// before dual stack, has `clusterIP` (KP-19).
fn cluster_ips(spec: &raw::ServiceSpec, problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    let fallback = std::slice::from_ref(&spec.cluster_ip);
    let given = if spec.cluster_ips.is_empty() { fallback } else { &spec.cluster_ips };
    let mut found: Vec<IpAddr> = Vec::new();
    for (position, text) in given.iter().enumerate() {
        let Some(address) = parse_address(text) else {
            problems.push(format!("cluster IP \"{text}\" is no IP address; it is left out"));
            continue;
        };
        let family = IpFamily::of(address);
        if let Some(wrong) = spec.ip_families.get(position).filter(|f| !is_family(f, family)) {
            problems.push(format!("cluster IP {address} is not of its family {wrong}; left out"));
        } else if found.iter().all(|other| IpFamily::of(*other) != family) {
            found.push(address);
        }
    }
    found
}

fn is_family(name: &str, family: IpFamily) -> bool {
    match family {
        IpFamily::V4 => name == "IPv4",
        IpFamily::V6 => name == "IPv6",
    }
}

fn service_port(raw: &raw::ServicePort, problems: &mut Vec<Problem>) -> Option<ServicePort> {
    let Some(port) = port_number(raw.port) else {
        problems.push(format!(
            "port {} (\"{}\") is not between 1 and 65535; it is left out",
            raw.port, raw.name
        ));
        return None;
    };
    let protocol = protocol(raw.protocol.as_deref(), problems)?;
    Some(ServicePort {
        name: raw.name.clone(),
        protocol,
        port,
        node_port: port_number(raw.node_port),
    })
}

pub(super) fn port_number(number: i64) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number != 0)
}

/// TCP is the API's default.
pub(super) fn protocol(name: Option<&str>, problems: &mut Vec<Problem>) -> Option<Protocol> {
    match name {
        None | Some("TCP" | "") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(other) => {
            problems
                .push(format!("protocol \"{other}\" is not one of TCP, UDP and SCTP; left out"));
            None
        }
    }
}

/// The slice that the object describes, as the node of that name sees it; `None` if it is none to use (KP-6
/// to 8).
pub fn slice(raw: &raw::EndpointSlice, node: &str, problems: &mut Vec<Problem>) -> Option<Slice> {
    let labels = &raw.metadata.labels;
    if labels.contains_key(HEADLESS) {
        return None;
    }
    let Some(service) = labels.get(SERVICE_NAME).filter(|name| !name.is_empty()) else {
        problems.push(format!("it has no label {SERVICE_NAME}, so it belongs to no Service"));
        return None;
    };
    let family = match raw.address_type.as_str() {
        "IPv4" => IpFamily::V4,
        "IPv6" => IpFamily::V6,
        other => {
            problems.push(format!("address type \"{other}\" is neither IPv4 nor IPv6; ignored"));
            return None;
        }
    };
    let weights = weights(&raw.metadata, problems);
    let endpoints = raw.endpoints.iter().filter_map(|raw| {
        let endpoint = endpoint(raw, family, node, problems)?;
        let weight = weights.get(&endpoint.address).copied().unwrap_or(1);
        Some(Endpoint { weight, ..endpoint })
    });
    let endpoints = kept(endpoints);
    Some(Slice {
        service: ObjectName::new(&raw.metadata.namespace, service),
        family,
        ports: kept(raw.ports.iter().filter_map(|port| slice_port(port, problems))),
        endpoints,
    })
}

/// A port without a name or without a number matches nothing (KP-9). That is legal, so no problem.
fn slice_port(raw: &raw::EndpointPort, problems: &mut Vec<Problem>) -> Option<EndpointPort> {
    let (name, number) = (raw.name.clone()?, raw.port?);
    let Some(port) = port_number(number) else {
        problems.push(format!("port {number} (\"{name}\") is not between 1 and 65535; left out"));
        return None;
    };
    Some(EndpointPort { name, protocol: protocol(raw.protocol.as_deref(), problems)?, port })
}

/// The first address counts (KP-10).
fn endpoint(
    raw: &raw::Endpoint,
    family: IpFamily,
    node: &str,
    problems: &mut Vec<Problem>,
) -> Option<Endpoint> {
    let text = raw.addresses.first()?;
    let Some(address) = parse_address(text).filter(|address| IpFamily::of(*address) == family)
    else {
        problems.push(format!("endpoint \"{text}\" is no address of the slice's family; left out"));
        return None;
    };
    let conditions = &raw.conditions;
    let named_here = raw.node_name.as_deref() == Some(node);
    Some(Endpoint {
        address,
        ready: conditions.ready.unwrap_or(true),
        serving: conditions.serving.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
        named_here,
        local: named_here,
        weight: 1,
        hints: hints(&raw.hints),
    })
}

fn hints(raw: &raw::Hints) -> Option<Box<Hints>> {
    let (zones, nodes) = (names(&raw.for_zones), names(&raw.for_nodes));
    (!zones.is_empty() || !nodes.is_empty()).then(|| Box::new(Hints { zones, nodes }))
}

fn names(hints: &[raw::Hint]) -> Vec<String> {
    hints.iter().map(|hint| hint.name.clone()).collect()
}

/// An address, sloppy ones included: Kubernetes accepts leading zeros in IPv4, as decimal (KP-21).
pub(super) fn parse_address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    let octets: Vec<u8> = text.split('.').map(decimal_octet).collect::<Option<_>>()?;
    let octets: [u8; 4] = octets.try_into().ok()?;
    Some(IpAddr::V4(Ipv4Addr::from(octets)))
}

fn decimal_octet(text: &str) -> Option<u8> {
    let digits = text.len() <= 3 && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}
