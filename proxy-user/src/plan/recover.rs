//! What the maps of an earlier agent hold, taken over: same ids, same backend numbers, so that live
//! flows keep their meaning.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use proxy_common::tables::{Algorithm, Range};

use super::{BackendEntry, Capacity, Filling, Held, Lead, Op, Planner, access};
use crate::desired::{Frontend, Port, PortId};
use crate::model::IpFamily;

/// A frontend as the maps hold it.
#[derive(Clone, Debug)]
pub struct ActualService {
    /// The frontend.
    pub frontend: Frontend,
    /// Where it leads.
    pub lead: Lead,
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
    /// The marks of addresses: flags of `ServiceValue`.
    pub marks: Vec<(IpAddr, u32)>,
    /// Source ranges, with the numbers of their Service ports.
    pub ranges: Vec<(u32, IpNet)>,
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
        for (id, range) in &actual.ranges {
            if *id == 0 {
                planner.exceptions.insert(*range);
                planner.reserve_ranges(&BTreeSet::from([*range]), usize::saturating_sub);
                continue;
            }
            match owners.get(id).and_then(|port| planner.held.get_mut(port)) {
                Some(held) => {
                    held.ranges.insert(*range);
                    let room = planner.ranges.get_mut(&IpFamily::of(range.addr()));
                    *room.expect("both families are there") -= 1;
                }
                None => ops.push(Op::Forbid { id: *id, range: *range }),
            }
        }
        let unnamed = actual.names.keys().filter(|id| !owners.contains_key(id));
        ops.extend(unnamed.map(|id| Op::Unname { id: *id }));
        // An agent may have been killed between a frontend and the mark of its address.
        for (address, flags) in &actual.marks {
            planner.frontends.adopt_mark(*address, *flags);
        }
        planner.frontends.repair_marks(&mut ops);
        (planner, ops)
    }

    /// Takes a frontend over, and its Service port if this is its first. False if it contradicts
    /// what was taken over before.
    fn adopt(&mut self, service: &ActualService, index: &Index<'_>) -> bool {
        let ActualService { frontend, lead } = *service;
        let Some(port) = index.actual.names.get(&lead.id) else { return false };
        let port = PortId { family: IpFamily::of(frontend.vip), ..port.clone() };
        let Some(range) = whole(&lead) else { return false };
        if let Some(held) = self.held.get_mut(&port) {
            if held.id != lead.id {
                return false;
            }
            // A change was cut off between two frontends: the next plan leads both alike.
            if held.range != range && !held.strays.contains(&range) {
                if !self.runs.adopt(range) {
                    return false;
                }
                held.strays.push(range);
            }
            held.wanted.frontends.insert(frontend, access(lead.flags));
        } else {
            if !self.ids.adopt(lead.id, 0) || !self.runs.adopt(range) {
                return false;
            }
            self.held.insert(port.clone(), adopted(service, range, index));
        }
        self.frontends.adopt(frontend, &port, lead);
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
            ops.push(Op::Backend { family, number, backend: entry.withdrawn() });
        }
    }
}

/// All of a frontend's slots, the cluster's and this node's; `None` if these do not follow those.
fn whole(lead: &Lead) -> Option<Range> {
    let Range { first, count } = lead.cluster;
    let follows = lead.local.count == 0 || lead.local.first == first.wrapping_add(count);
    follows.then(|| Range { first, count: count.saturating_add(lead.local.count) })
}

/// A Service port as its first frontend tells of it. What is in its slots is compared with what is
/// wanted by the first plan.
fn adopted(service: &ActualService, range: Range, index: &Index<'_>) -> Held {
    let family = IpFamily::of(service.frontend.vip);
    let addresses = |range: Range| -> Vec<SocketAddr> {
        let slots = range.first..range.first.saturating_add(range.count);
        let numbers = slots.filter_map(|slot| index.actual.slots.get(&slot));
        numbers.filter_map(|number| index.addresses.get(&(family, *number))).copied().collect()
    };
    let Lead { id, cluster, local, flags, .. } = service.lead;
    let algorithm = Algorithm::ALL.into_iter().find(|algorithm| algorithm.is_in(flags));
    Held {
        id,
        wanted: Port {
            frontends: BTreeMap::from([(service.frontend, access(flags))]),
            algorithm: algorithm.unwrap_or_default(),
            ..Port::default()
        },
        range,
        cluster: cluster.count,
        filling: Filling { cluster: addresses(cluster), local: addresses(local) }.mark(),
        adopted: true,
        strays: Vec::new(),
        ranges: BTreeSet::new(),
        numbers: HashMap::new(),
    }
}
