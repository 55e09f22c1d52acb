//! What the maps of an earlier agent hold, taken over: same ids, same backend numbers, so that live
//! flows keep their meaning.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use proxy_common::tables::Range;

use super::{BackendEntry, Capacity, Held, Op, Planner};
use crate::desired::{Backend, Frontend, Port, PortId};
use crate::model::IpFamily;

/// A frontend as the maps hold it.
#[derive(Clone, Debug)]
pub struct ActualService {
    /// The frontend.
    pub frontend: Frontend,
    /// The Service port's number.
    pub id: u32,
    /// Its slots.
    pub range: Range,
}

/// A backend as the maps hold it.
#[derive(Clone, Copy, Debug)]
pub struct ActualBackend {
    /// The family's table.
    pub family: IpFamily,
    /// Its number.
    pub number: u32,
    /// What is written there.
    pub entry: BackendEntry,
}

/// What the maps hold.
#[derive(Clone, Default, Debug)]
pub struct Actual {
    /// Frontends, without the marks of VIPs.
    pub services: Vec<ActualService>,
    /// The addresses that are marked as VIPs.
    pub vips: Vec<IpAddr>,
    /// The names of Service ports, by number; the family is not known from a name.
    pub names: HashMap<u32, PortId>,
    /// All backends that were ever written.
    pub backends: Vec<ActualBackend>,
    /// The backend numbers in the slots that frontends lead to.
    pub slots: HashMap<u32, u32>,
}

/// The actual tables by number, for look-ups.
struct Index<'a> {
    actual: &'a Actual,
    addresses: HashMap<(IpFamily, u32), SocketAddr>,
}

impl Planner {
    /// A planner for tables that hold `actual`, and the writes that remove what makes no sense in them
    /// (left by an agent that was killed in the middle of a change).
    pub fn recover(capacity: Capacity, actual: &Actual) -> (Self, Vec<Op>) {
        let mut planner = Self::new(capacity);
        let mut ops = Vec::new();
        let addresses =
            actual.backends.iter().map(|b| ((b.family, b.number), b.entry.address)).collect();
        let index = Index { actual, addresses };
        for service in &actual.services {
            if !planner.adopt(service, &index) {
                ops.push(Op::Remove { frontend: service.frontend });
            }
        }
        let owners: HashMap<u32, PortId> =
            planner.held.iter().map(|(port, held)| (held.id, port.clone())).collect();
        for backend in &actual.backends {
            planner.adopt_backend(backend, owners.get(&backend.entry.service), &mut ops);
        }
        let unnamed = actual.names.keys().filter(|id| !owners.contains_key(id));
        ops.extend(unnamed.map(|id| Op::Unname { id: *id }));
        planner.repair_marks(&actual.vips, &mut ops);
        (planner, ops)
    }

    /// An agent may have been killed between a frontend and the mark of its VIP.
    fn repair_marks(&self, marked: &[IpAddr], ops: &mut Vec<Op>) {
        let marked: BTreeSet<IpAddr> = marked.iter().copied().collect();
        let wanted = self.frontends.vips();
        ops.extend(wanted.difference(&marked).map(|vip| Op::MarkVip { vip: *vip }));
        ops.extend(marked.difference(&wanted).map(|vip| Op::UnmarkVip { vip: *vip }));
    }

    /// Takes a frontend over, and its Service port if this is its first. False if it contradicts
    /// what was taken over before.
    fn adopt(&mut self, service: &ActualService, index: &Index<'_>) -> bool {
        let Some(port) = index.actual.names.get(&service.id) else { return false };
        let port = PortId { family: IpFamily::of(service.frontend.vip), ..port.clone() };
        if let Some(held) = self.held.get_mut(&port) {
            if held.id != service.id || held.range != service.range {
                return false;
            }
            held.wanted.frontends.push(service.frontend);
        } else {
            if !self.ids.adopt(service.id, 0) || !self.runs.adopt(service.range) {
                return false;
            }
            self.held.insert(port.clone(), adopted(service, index));
        }
        self.frontends.adopt(service.frontend, &port);
        true
    }

    fn adopt_backend(
        &mut self,
        backend: &ActualBackend,
        owner: Option<&PortId>,
        ops: &mut Vec<Op>,
    ) {
        let ActualBackend { family, number, entry } = *backend;
        let numbers = self.backends.get_mut(&family).expect("both families are there");
        let owner = owner.filter(|port| entry.serving && port.family == family);
        if let Some(held) = owner.and_then(|port| self.held.get_mut(port))
            && !held.numbers.contains_key(&entry.address)
        {
            numbers.adopt(number, entry.generation);
            held.numbers.insert(entry.address, (number, entry));
            return;
        }
        numbers.remember(number, entry.generation);
        if entry.serving {
            let withdrawn = BackendEntry { serving: false, ..entry };
            ops.push(Op::Backend { family, number, backend: withdrawn });
        }
    }
}

/// A Service port as its first frontend tells of it. Its wish list is what its slots hold; the first
/// plan compares it with what is wanted now.
fn adopted(service: &ActualService, index: &Index<'_>) -> Held {
    let family = IpFamily::of(service.frontend.vip);
    let slots = service.range.first..service.range.first + service.range.count;
    let numbers = slots.filter_map(|slot| index.actual.slots.get(&slot));
    let backends = numbers
        .filter_map(|number| index.addresses.get(&(family, *number)))
        .map(|address| Backend { address: *address, usable: true, serving: true, local: false });
    Held {
        id: service.id,
        wanted: Port {
            created: String::new(),
            frontends: vec![service.frontend],
            backends: backends.collect(),
        },
        range: service.range,
        numbers: HashMap::new(),
    }
}
