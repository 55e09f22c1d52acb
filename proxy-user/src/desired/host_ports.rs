//! Ports of the node that lead to its pods.

use std::collections::BTreeMap;
use std::hash::Hasher;
use std::net::SocketAddr;

use fnv::FnvHasher;
use proxy_common::tables::Algorithm;

use super::{Access, Backend, Criteria, Frontend, Port, PortId, Tables};
use crate::model::{HostPort, IpFamily, ObjectName, Pod};

/// How the names of host ports begin: as no name of a Service's port can.
pub(super) const HOST_PORT: &str = "host-port/";
/// The longest name that the maps hold.
const LONGEST: usize = 63;

/// What the kernel should hold for a pod's host ports.
pub fn host_ports(name: &ObjectName, pod: &Pod) -> Tables {
    let mut tables = Tables::new();
    for address in &pod.addresses {
        let family = IpFamily::of(*address);
        for host_port in &pod.host_ports {
            let vip = match host_port.address {
                None => family.any(),
                Some(own) if IpFamily::of(own) == family => own,
                Some(_) => continue,
            };
            let HostPort { port, protocol, target, .. } = *host_port;
            let access = Access { host_port: true, ..Access::default() };
            let backend = Backend {
                address: SocketAddr::new(*address, target),
                usable: true,
                usable_local: true,
                serving: true,
                local: true,
                weight: 1,
            };
            let wanted = Port {
                created: pod.created.clone(),
                frontends: BTreeMap::from([(Frontend { vip, port, protocol }, access)]),
                backends: vec![backend],
                criteria: Criteria::default(),
                affinity: 0,
                algorithm: Algorithm::default(),
                source_ranges: Vec::new(),
            };
            let port = port_name(host_port);
            tables.insert(PortId { service: short(name), port, protocol, family }, wanted);
        }
    }
    tables
}

fn port_name(port: &HostPort) -> String {
    match port.address {
        None => format!("{HOST_PORT}{}", port.port),
        Some(address) => format!("{HOST_PORT}{}", SocketAddr::new(address, port.port)),
    }
}

/// The pod's name, cut if it is longer than the maps hold, with something that tells it from others.
fn short(name: &ObjectName) -> ObjectName {
    if name.name.len() <= LONGEST {
        return name.clone();
    }
    let mut hasher = FnvHasher::default();
    hasher.write(name.name.as_bytes());
    let tail = format!("~{:016x}", hasher.finish());
    let head: String = name.name.chars().take(LONGEST - tail.len()).collect();
    ObjectName { namespace: name.namespace.clone(), name: (head + &tail).into() }
}
