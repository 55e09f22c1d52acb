//! A Service port as the kernel holds it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use ipnet::IpNet;
use proxy_common::settings::ticks;
use proxy_common::tables::{Algorithm, Choice, ServiceValue};

use super::allocate::Numbers;
use super::op::{BackendEntry, Lead, Op, flags_of};
use super::slots::{Candidates, Part, Slots};
use super::spread::Weighted;
use crate::desired::{Access, Backend, Frontend, Port};
use crate::model::IpFamily;

/// Backends that a Service port gives up: their numbers, and what is written there.
pub type Leaving = Vec<(u32, BackendEntry)>;

/// A Service port as the kernel holds it.
#[derive(Clone, Debug)]
pub struct Held {
    /// Its number.
    pub id: u32,
    /// What was planned last: a hash of it; 0 if that is not in force, or not known.
    pub planned: u64,
    /// Its frontends.
    pub frontends: BTreeMap<Frontend, Access>,
    affinity: u32,
    algorithm: Algorithm,
    /// Whether one of the frontends that are wanted is led to backends of this node only.
    asks_for_local: bool,
    /// Where the cluster's backends are to choose from.
    pub cluster: Part,
    /// Where this node's are.
    pub local: Part,
    /// What frontends led to when it was taken over, beside its own.
    pub strays: Vec<Part>,
    /// The source ranges that the maps hold.
    pub ranges: BTreeSet<IpNet>,
    /// Its backends by address: their numbers, and what was written there.
    pub backends: Vec<(u32, BackendEntry)>,
}

impl Held {
    /// A Service port that has a number and nothing else.
    pub fn new(id: u32) -> Self {
        Self {
            id,
            planned: 0,
            frontends: BTreeMap::new(),
            affinity: 0,
            algorithm: Algorithm::default(),
            asks_for_local: false,
            cluster: Part::default(),
            local: Part::default(),
            strays: Vec::new(),
            ranges: BTreeSet::new(),
            backends: Vec::new(),
        }
    }

    /// One that was taken over, as a frontend tells of it; its slots are not known yet.
    pub fn adopted(lead: Lead) -> Self {
        let by = |algorithm: &Algorithm| algorithm.is_in(lead.flags);
        let algorithm = Algorithm::ALL.into_iter().find(by).unwrap_or_default();
        Self { algorithm, ..Self::new(lead.id) }
    }

    /// Whether it was noted that a frontend leads there.
    pub fn leads_to(&self, choice: Choice) -> bool {
        choice.count == 0 || self.parts().chain(&self.strays).any(|part| part.choice == choice)
    }

    /// Whether the members of a choice are one of its parts' already.
    pub fn has_members(&self, choice: Choice) -> bool {
        let is_there = |part: &Part| part.choice.count > 0 && part.choice.members == choice.members;
        self.parts().chain(&self.strays).any(is_there)
    }

    /// Notes where its first frontend leads. Others may lead elsewhere, if a change was cut off between two:
    /// the next plan leads all alike, and gives that back.
    pub fn adopt(&mut self, is_local: bool, part: Part) {
        let own = if is_local { &mut self.local } else { &mut self.cluster };
        if self.frontends.is_empty() { *own = part } else { self.strays.push(part) }
    }

    /// Both parts of the slots.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        [&self.cluster, &self.local].into_iter()
    }

    /// Gives each wanted backend its number, as far as there are numbers, and writes it if it is new or has
    /// changed. Returns those that are not wanted any more, and whether there were numbers for all.
    pub fn take_backends(
        &mut self,
        family: IpFamily,
        numbers: &mut Numbers,
        wanted: &Port,
        ops: &mut Vec<Op>,
    ) -> (Leaving, bool) {
        let counted = wanted.algorithm == Algorithm::LeastConn;
        let mut before = std::mem::take(&mut self.backends).into_iter();
        let mut next = before.next();
        self.backends.reserve(wanted.backends.len());
        let (mut leaving, mut all) = (Vec::new(), true);
        for backend in &wanted.backends {
            // Both are sorted.
            let known = loop {
                let order = next.map(|(_, entry)| entry.address.cmp(&backend.address));
                match order {
                    Some(Ordering::Less) => {
                        leaving.extend(std::mem::replace(&mut next, before.next()));
                    }
                    Some(Ordering::Equal) => break std::mem::replace(&mut next, before.next()),
                    Some(Ordering::Greater) | None => break None,
                }
            };
            let place = known
                .map(|(number, entry)| (number, entry.generation))
                .or_else(|| numbers.take_with_generation());
            let Some((number, generation)) = place else {
                all = false;
                continue;
            };
            let entry = BackendEntry { counted, ..entry(backend, generation, self.id) };
            if known != Some((number, entry)) {
                ops.push(Op::Backend { family, number, backend: entry });
            }
            self.backends.push((number, entry));
        }
        leaving.extend(next.into_iter().chain(before));
        (leaving, all)
    }

    /// Lets in clients from the wanted source ranges, as far as there is room. False if that was not for all.
    pub fn allow(&mut self, room: &mut usize, wanted: &Port, ops: &mut Vec<Op>) -> bool {
        for range in &wanted.source_ranges {
            if self.ranges.contains(range) {
                continue;
            }
            if *room == 0 {
                return false;
            }
            *room -= 1;
            self.ranges.insert(*range);
            ops.push(Op::Allow { id: self.id, range: *range });
        }
        true
    }

    /// Keeps out clients from all other ranges.
    pub fn forbid(&mut self, room: &mut usize, wanted: &Port, ops: &mut Vec<Op>) {
        let id = self.id;
        let closed = self.ranges.extract_if(.., |range| !wanted.source_ranges.contains(range));
        ops.extend(closed.map(|range| {
            *room += 1;
            Op::Forbid { id, range }
        }));
    }

    /// Takes in which frontends lead here, but for those that are refused. Others stay until they are given up.
    pub fn lead_to(&mut self, wanted: &Port, refused: &[Frontend]) {
        let admitted = wanted.frontends.iter().filter(|(frontend, _)| !refused.contains(frontend));
        self.frontends.extend(admitted.map(|(frontend, access)| (*frontend, *access)));
    }

    /// Takes in how backends are chosen.
    pub fn want(&mut self, wanted: &Port) {
        let asks_for_local = |access: &Access| access.local_for_all || access.local_for_outside;
        self.asks_for_local = wanted.frontends.values().any(asks_for_local);
        self.affinity = wanted.affinity;
        self.algorithm = wanted.algorithm;
    }

    /// Its frontends that are not wanted any more.
    pub fn give_up(&mut self, wanted: &Port) -> Vec<Frontend> {
        let gone = self.frontends.extract_if(.., |f, _| !wanted.frontends.contains_key(f));
        gone.map(|(frontend, _)| frontend).collect()
    }

    /// Says how much room the slots for its backends would take.
    pub fn note(&mut self, slots: &mut Slots) {
        let weighted = |is_usable: fn(&BackendEntry) -> bool| -> Vec<Weighted> {
            let usable = self.backends.iter().filter(|(_, entry)| is_usable(entry));
            usable.map(|(_, entry)| (entry.address, entry.weight)).collect()
        };
        let cluster = weighted(|entry| entry.usable);
        let local =
            if self.asks_for_local { weighted(|entry| entry.usable_local) } else { Vec::new() };
        slots.note(&mut self.cluster, self.algorithm, &cluster);
        slots.note(&mut self.local, self.algorithm, &local);
    }

    /// Has slots lead to the backends that take new flows. False if there was no room for that.
    pub fn fill(&mut self, now: Instant, slots: &mut Slots, ops: &mut Vec<Op>) -> bool {
        let candidates = |is_usable: fn(&BackendEntry) -> bool| -> Candidates {
            let usable = self.backends.iter().filter(|(_, entry)| is_usable(entry));
            usable.map(|(number, entry)| ((entry.address, entry.weight), *number)).collect()
        };
        let cluster = candidates(|entry| entry.usable);
        let local = if self.asks_for_local {
            candidates(|entry| entry.usable_local)
        } else {
            Candidates::default()
        };
        let mut done = true;
        for (part, candidates) in [(&mut self.cluster, cluster), (&mut self.local, local)] {
            done &= slots.fill(now, part, self.algorithm, &candidates, ops);
        }
        done
    }

    /// Where one of its frontends leads.
    pub fn lead(&self, frontend: Frontend) -> Lead {
        let access = self.frontends.get(&frontend).copied().unwrap_or_default();
        Lead {
            id: self.id,
            cluster: self.cluster.choice,
            local: self.local.choice,
            affinity: ticks(self.affinity.into()),
            flags: flags(access) | self.algorithm.flags(),
        }
    }
}

fn entry(backend: &Backend, generation: u16, service: u32) -> BackendEntry {
    BackendEntry {
        address: backend.address,
        generation,
        serving: backend.serving,
        local: backend.local,
        usable: backend.usable,
        usable_local: backend.usable_local,
        counted: false,
        weight: backend.weight,
        service,
    }
}

/// One thing that a frontend's flags say of its access: where it is kept, and its flag.
type Field = fn(&mut Access) -> (&mut bool, u32);

/// All of them.
const ACCESS: [Field; 6] = [
    |access| (&mut access.refuses, ServiceValue::REFUSES),
    |access| (&mut access.local_for_all, ServiceValue::LOCAL_FOR_ALL),
    |access| (&mut access.local_for_outside, ServiceValue::LOCAL_FOR_OUTSIDE),
    |access| (&mut access.source_ranges, ServiceValue::SOURCE_RANGES),
    |access| (&mut access.node_allowed, ServiceValue::NODE_ALLOWED),
    |access| (&mut access.host_port, ServiceValue::HOST_PORT),
];

fn flags(mut access: Access) -> u32 {
    flags_of(&ACCESS.map(|field| {
        let (set, flag) = field(&mut access);
        (*set, flag)
    }))
}

/// The access that flags stand for.
pub fn access(flags: u32) -> Access {
    let mut access = Access::default();
    for field in ACCESS {
        let (set, flag) = field(&mut access);
        *set = flags & flag != 0;
    }
    access
}
