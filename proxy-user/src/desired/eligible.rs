//! Which endpoints a Service port has, and which of them take new flows.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::{Backend, PortId};
use crate::model::{Cluster, Endpoint, Node, Slice};

/// The endpoints of a Service port, out of all slices of its Service (KP-9, 13, 15), sorted.
///
/// Usable are the ready ones that the topology hints leave; if none is ready, those that still serve
/// while they terminate (KP-49, 62). The same is decided for this node's endpoints alone (KP-63), where
/// hints do not count (KP-67).
pub fn backends(cluster: &Cluster, node: &Node, id: &PortId) -> Vec<Backend> {
    let endpoints = merged(cluster, id);
    let is_local = |endpoint: &Endpoint| endpoint.node.as_deref() == Some(&node.name);
    let any_ready = endpoints.values().any(|endpoint| endpoint.ready);
    let local_ready = endpoints.values().any(|e| e.ready && is_local(e));
    let topology = Topology::of(&endpoints.values().copied(), node);
    let serves = |endpoint: &Endpoint, any_ready: bool| {
        if any_ready { endpoint.ready } else { endpoint.serving && endpoint.terminating }
    };
    let backends = endpoints.into_iter().map(|(address, endpoint)| Backend {
        address,
        usable: serves(endpoint, any_ready) && (!any_ready || topology.takes(endpoint, node)),
        usable_local: is_local(endpoint) && serves(endpoint, local_ready),
        serving: endpoint.serving || endpoint.ready,
        local: is_local(endpoint),
        weight: endpoint.weight,
    });
    let mut backends: Vec<Backend> = backends.collect();
    spare_weightless(&mut backends, |backend| &mut backend.usable);
    spare_weightless(&mut backends, |backend| &mut backend.usable_local);
    backends.retain(|backend| backend.usable || backend.usable_local || backend.serving);
    backends
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
#[derive(Clone, Copy, PartialEq, Eq)]
enum Topology {
    /// All.
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
        if decides(|endpoint| &endpoint.nodes, &node.name) {
            return Self::Node;
        }
        match &node.zone {
            Some(zone) if decides(|endpoint| &endpoint.zones, zone) => Self::Zone,
            _ => Self::Cluster,
        }
    }

    fn takes(self, endpoint: &Endpoint, node: &Node) -> bool {
        match self {
            Self::Cluster => true,
            Self::Zone => endpoint.zones.iter().any(|zone| Some(zone) == node.zone.as_ref()),
            Self::Node => endpoint.nodes.contains(&node.name),
        }
    }
}

/// The endpoints of a Service port, each address once.
fn merged<'a>(cluster: &'a Cluster, id: &'a PortId) -> BTreeMap<SocketAddr, &'a Endpoint> {
    let mut merged: BTreeMap<SocketAddr, &Endpoint> = BTreeMap::new();
    for slice in cluster.slices(&id.service).filter(|slice| slice.family == id.family) {
        for (address, endpoint) in endpoints(slice, id) {
            let known = merged.get(&address);
            if known.is_none_or(|known| replaces(endpoint, known)) {
                merged.insert(address, endpoint);
            }
        }
    }
    merged
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
