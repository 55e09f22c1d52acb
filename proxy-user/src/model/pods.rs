//! From a Pod to its ports of the node.

use std::net::IpAddr;

use super::from_k8s::{Problem, parse_address, port_number, protocol};
use super::{HostPort, IpFamily, Pod};
use crate::watch::raw;

/// The pod that the object describes; `None` if it is not one of that node with ports of the node. One
/// that has ended has lost its address, which may soon be another's.
pub fn pod(raw: &raw::Pod, node: &str, problems: &mut Vec<Problem>) -> Option<Pod> {
    let raw::PodSpec { node_name, host_network, containers, init_containers } = &raw.spec;
    let has_ended = matches!(raw.status.phase.as_str(), "Succeeded" | "Failed");
    if node_name != node || *host_network || has_ended {
        return None;
    }
    // Init containers that stay beside the others.
    let sidecars = init_containers.iter().filter(|c| c.restart_policy == "Always");
    let ports = containers.iter().chain(sidecars).flat_map(|container| &container.ports);
    let mut host_ports: Vec<HostPort> =
        ports.filter_map(|port| host_port(port, problems)).collect();
    host_ports.sort_unstable();
    host_ports.dedup();
    let addresses = addresses(&raw.status, problems);
    let (uid, created) = (raw.metadata.uid.clone(), raw.metadata.creation_timestamp.clone());
    let serves = !host_ports.is_empty() && !addresses.is_empty();
    serves.then_some(Pod { uid, created, addresses, host_ports })
}

fn host_port(raw: &raw::ContainerPort, problems: &mut Vec<Problem>) -> Option<HostPort> {
    if raw.host_port == 0 {
        return None;
    }
    let (Some(port), Some(target)) = (port_number(raw.host_port), port_number(raw.container_port))
    else {
        problems.push(format!(
            "host port {} to {}: ports are between 1 and 65535; it is left out",
            raw.host_port, raw.container_port
        ));
        return None;
    };
    let address = parse_address(&raw.host_ip);
    if address.is_none() && !raw.host_ip.is_empty() {
        problems.push(format!(
            "host port {port}: host IP \"{}\" is no IP address; it is left out",
            raw.host_ip
        ));
        return None;
    }
    Some(HostPort { address, port, protocol: protocol(raw.protocol.as_deref(), problems)?, target })
}

/// The first of each family.
fn addresses(status: &raw::PodStatus, problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    let mut texts: Vec<&str> = status.pod_ips.iter().map(|ip| ip.ip.as_str()).collect();
    if texts.is_empty() && !status.pod_ip.is_empty() {
        texts.push(&status.pod_ip);
    }
    let mut found: Vec<IpAddr> = Vec::new();
    for text in texts {
        match parse_address(text) {
            Some(ip) if found.iter().all(|other| IpFamily::of(*other) != IpFamily::of(ip)) => {
                found.push(ip);
            }
            Some(_) => {}
            None => problems.push(format!("pod IP \"{text}\" is no IP address; it is left out")),
        }
    }
    found
}
