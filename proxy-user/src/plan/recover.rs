//! What the maps of an earlier agent hold, taken over: same ids, same backend numbers, so that live
//! flows keep their meaning.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use super::held::{Held, access};
use super::{BackendEntry, Capacity, Lead, Op, Planner};
use crate::desired::{Frontend, PortId};
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
    /// What is in the slots, up to the last one that a frontend leads to.
    pub slots: Vec<u32>,
}

impl Planner {
    /// A planner for tables that hold `actual`, and the writes that remove what makes no sense in them
    /// (left by an agent that was killed in the middle of a change).
    pub fn recover(capacity: Capacity, actual: &Actual) -> (Self, Vec<Op>) {
        let mut planner = Self::new(capacity);
        let mut ops = Vec::new();
        for service in &actual.services {
            if !planner.adopt(service, actual) {
                ops.push(Op::Remove { frontend: service.frontend });
            }
        }
        let owners: HashMap<u32, PortId> =
            planner.held.iter().map(|(port, held)| (held.id, port.clone())).collect();
        let mut backends: Vec<&ActualBackend> = actual.backends.iter().collect();
        backends.sort_unstable_by_key(|backend| backend.entry.address);
        for backend in backends {
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
    fn adopt(&mut self, service: &ActualService, actual: &Actual) -> bool {
        let ActualService { frontend, lead } = *service;
        let Some(port) = actual.names.get(&lead.id) else { return false };
        let port = PortId { family: IpFamily::of(frontend.vip), ..port.clone() };
        match self.held.get(&port) {
            Some(held) if held.id != lead.id => return false,
            Some(_) => {}
            None => {
                if !self.ids.adopt(lead.id, 0) {
                    return false;
                }
                self.names.insert(lead.id, port.clone());
                self.held.insert(port.clone(), Held::adopted(lead));
            }
        }
        let held = self.held.get_mut(&port).expect("it is held");
        for (is_local, choice) in [(false, lead.cluster), (true, lead.local)] {
            if held.leads_to(choice) {
                continue;
            }
            let has_members = held.has_members(choice);
            let taken = self.slots.adopt(choice, &actual.slots, has_members);
            let Some(taken) = taken else { return false };
            held.adopt(is_local, taken);
        }
        held.put_frontend(frontend, access(lead.flags));
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
            && held.backends.last().is_none_or(|(_, last)| last.address != entry.address)
            && numbers.adopt(number, entry.generation)
        {
            held.backends.push((number, entry));
            return;
        }
        numbers.remember(number, entry.generation);
        if entry.serving {
            ops.push(Op::Backend { family, number, backend: entry.withdrawn() });
        }
    }
}
