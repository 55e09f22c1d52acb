//! Which endpoints a Service port has, and which of them take new flows.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::{Backend, PortId};
use crate::model::{Cluster, Endpoint, Node, Slice};

/// The endpoints of a Service port, out of all slices of its Service (KP-9, 13, 15), sorted.
///
/// Usable are the ready ones; if there are none, those that still serve while they terminate (KP-49).
pub fn backends(cluster: &Cluster, node: &Node, id: &PortId) -> Vec<Backend> {
    let mut merged: BTreeMap<SocketAddr, &Endpoint> = BTreeMap::new();
    for slice in cluster.slices(&id.service).filter(|slice| slice.family == id.family) {
        for (address, endpoint) in endpoints(slice, id) {
            let known = merged.get(&address);
            if known.is_none_or(|known| replaces(endpoint, known)) {
                merged.insert(address, endpoint);
            }
        }
    }
    let any_ready = merged.values().any(|endpoint| endpoint.ready);
    let backends = merged.into_iter().map(|(address, endpoint)| Backend {
        address,
        usable: if any_ready { endpoint.ready } else { endpoint.serving && endpoint.terminating },
        serving: endpoint.serving || endpoint.ready,
        local: endpoint.node.as_deref() == Some(&node.name),
    });
    backends.filter(|backend| backend.usable || backend.serving).collect()
}

/// The slice's endpoints for the port of that name and protocol (KP-9).
fn endpoints<'a>(
    slice: &'a Slice,
    id: &'a PortId,
) -> impl Iterator<Item = (SocketAddr, &'a Endpoint)> {
    let matching = slice.ports.iter().filter(|p| p.name == id.port && p.protocol == id.protocol);
    matching
        .flat_map(|port| slice.endpoints.iter().map(|e| (SocketAddr::new(e.address, port.port), e)))
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
