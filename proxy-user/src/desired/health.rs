//! What a load balancer is told when it asks whether a node has endpoints of a Service (KP-101, KP-105).

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::model::{Cluster, IpFamily, ObjectName};

/// The answer for one Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HealthCheck {
    /// The Service.
    pub service: ObjectName,
    /// The port where it is asked.
    pub port: u16,
    /// How many addresses of this node are ready, of IPv4 and of IPv6.
    pub local: [usize; 2],
}

/// What to answer for a Service; nothing if nobody is to ask.
pub fn health_check(cluster: &Cluster, name: &ObjectName) -> Option<HealthCheck> {
    let port = cluster.service(name)?.health_check_port?;
    let local = [IpFamily::V4, IpFamily::V6].map(|family| {
        let slices = cluster.slices(name).filter(|slice| slice.family == family);
        let endpoints = slices.flat_map(|slice| &slice.endpoints);
        let here = endpoints.filter(|e| e.ready && e.local);
        here.map(|endpoint| endpoint.address).collect::<BTreeSet<IpAddr>>().len()
    });
    Some(HealthCheck { service: name.clone(), port, local })
}
