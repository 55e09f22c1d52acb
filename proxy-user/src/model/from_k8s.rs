//! From Kubernetes objects to facts: every `Option` is decided here, once, and every malformed field
//! is reported by the object's name while the rest of the object counts.

use std::net::{IpAddr, Ipv4Addr};

use super::{Endpoint, IpFamily, ObjectName, Protocol, Service, ServicePort, Slice};
use crate::watch::raw;

/// A Service with this label is another proxy's (KP-3).
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// A slice with this label is not to be seen (KP-6).
const HEADLESS: &str = "service.kubernetes.io/headless";
/// The label that ties a slice to its Service (KP-7).
const SERVICE_NAME: &str = "kubernetes.io/service-name";

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
    let cluster_ips = cluster_ips(spec, problems);
    let ports = spec.ports.iter().filter_map(|port| service_port(port, problems)).collect();
    Some(Service { created: raw.metadata.creation_timestamp.clone(), cluster_ips, ports })
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
    Some(ServicePort { name: raw.name.clone(), protocol, port })
}

fn port_number(number: i64) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number != 0)
}

/// TCP is the API's default.
fn protocol(name: Option<&str>, problems: &mut Vec<Problem>) -> Option<Protocol> {
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

/// The slice that the object describes; `None` if it is none to use (KP-6 to 8).
pub fn slice(raw: &raw::EndpointSlice, problems: &mut Vec<Problem>) -> Option<Slice> {
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
    let endpoints = raw.endpoints.iter().filter_map(|e| endpoint(e, family, problems)).collect();
    Some(Slice {
        service: ObjectName::new(&raw.metadata.namespace, service),
        family,
        ports: raw.ports.iter().filter_map(|port| slice_port(port, problems)).collect(),
        endpoints,
    })
}

/// A port without a name or without a number matches nothing (KP-9). That is legal, so no problem.
fn slice_port(raw: &raw::EndpointPort, problems: &mut Vec<Problem>) -> Option<ServicePort> {
    let (name, number) = (raw.name.clone()?, raw.port?);
    if number == 0 {
        return None;
    }
    let Some(port) = port_number(number) else {
        problems.push(format!("port {number} (\"{name}\") is not between 1 and 65535; left out"));
        return None;
    };
    Some(ServicePort { name, protocol: protocol(raw.protocol.as_deref(), problems)?, port })
}

/// The first address counts (KP-10).
fn endpoint(
    raw: &raw::Endpoint,
    family: IpFamily,
    problems: &mut Vec<Problem>,
) -> Option<Endpoint> {
    let text = raw.addresses.first()?;
    let Some(address) = parse_address(text).filter(|address| IpFamily::of(*address) == family)
    else {
        problems.push(format!("endpoint \"{text}\" is no address of the slice's family; left out"));
        return None;
    };
    let conditions = &raw.conditions;
    Some(Endpoint {
        address,
        ready: conditions.ready.unwrap_or(true),
        serving: conditions.serving.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
        node: raw.node_name.clone(),
    })
}

/// An address, sloppy ones included: Kubernetes accepts leading zeros in IPv4, as decimal (KP-21).
fn parse_address(text: &str) -> Option<IpAddr> {
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
