//! A Service port as the kernel holds it.

use std::collections::BTreeSet;
use std::time::Instant;

use ipnet::IpNet;
use proxy_common::settings::ticks;
use proxy_common::tables::{Algorithm, Choice, ServiceValue};

use super::allocate::Numbers;
use super::op::{BackendEntry, Lead, Op, flags_of};
use super::slots::{Candidates, Part, Slots};
use crate::desired::{Access, Backend, Criteria, Frontend, Patch, Port};
use crate::model::IpFamily;

/// A backend's number, and what is written there.
pub type Numbered = (u32, BackendEntry);

/// Backends that a Service port gives up.
pub type Leaving = Vec<Numbered>;

/// A Service port as the kernel holds it.
#[derive(Clone, Debug)]
pub struct Held {
    /// Its number.
    pub id: u32,
    /// What was planned last: a hash of it; 0 if that is not in force, or not known.
    pub planned: u64,
    /// Its frontends.
    pub frontends: Vec<(Frontend, Access)>,
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
    /// Its backends by address.
    pub backends: Vec<Numbered>,
    /// By what those were judged.
    pub criteria: Criteria,
}

impl Held {
    /// A Service port that has a number and nothing else.
    pub fn new(id: u32) -> Self {
        Self {
            id,
            planned: 0,
            frontends: Vec::new(),
            affinity: 0,
            algorithm: Algorithm::default(),
            asks_for_local: false,
            cluster: Part::default(),
            local: Part::default(),
            strays: Vec::new(),
            ranges: BTreeSet::new(),
            backends: Vec::new(),
            criteria: Criteria::default(),
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
        let mut writes = BackendWrites { family, service: self.id, counted, ops };
        // Both are sorted, and few come or go among very many: what stays at both ends stays in its place.
        let wanted = &wanted.backends[..];
        let is_same = |(held, wanted): &(&Numbered, &Backend)| held.1.address == wanted.address;
        let start = self.backends.iter().zip(wanted).take_while(is_same).count();
        let ends = self.backends[start..].iter().rev().zip(wanted[start..].iter().rev());
        let end = ends.take_while(is_same).count();
        let (held_end, wanted_end) = (self.backends.len() - end, wanted.len() - end);
        let (first, last) = (&mut self.backends[..start], &wanted[..start]);
        first.iter_mut().zip(last).for_each(|(held, backend)| writes.again(held, backend));
        let (first, last) = (&mut self.backends[held_end..], &wanted[wanted_end..]);
        first.iter_mut().zip(last).for_each(|(held, backend)| writes.again(held, backend));

        let before = self.backends[start..held_end].to_vec();
        let (between, leaving, all) =
            merge(before, &wanted[start..wanted_end], numbers, &mut writes);
        self.backends.splice(start..held_end, between);
        self.backends.shrink_to(wanted.len());
        (leaving, all)
    }

    /// The same, if only those at some addresses have changed.
    pub fn patch_backends(
        &mut self,
        numbers: &mut Numbers,
        patch: &Patch,
        ops: &mut Vec<Op>,
    ) -> (Leaving, bool) {
        let counted = self.algorithm == Algorithm::LeastConn;
        let mut writes =
            BackendWrites { family: patch.port.family, service: self.id, counted, ops };
        let before = std::mem::take(&mut self.backends);
        self.backends.reserve_exact(before.len() + patch.backends.len());
        let (mut rest, mut wanted) = (&before[..], &patch.backends[..]);
        let (mut leaving, mut all) = (Leaving::new(), true);
        for address in &patch.addresses {
            let (stay, others) =
                rest.split_at(rest.partition_point(|(_, e)| e.address.ip() < *address));
            let (held, others) =
                others.split_at(others.partition_point(|(_, e)| e.address.ip() == *address));
            let (these, later) =
                wanted.split_at(wanted.partition_point(|b| b.address.ip() <= *address));
            let (merged, gone, whole) = merge(held.to_vec(), these, numbers, &mut writes);
            self.backends.extend_from_slice(stay);
            self.backends.extend(merged);
            leaving.extend(gone);
            all &= whole;
            (rest, wanted) = (others, later);
        }
        self.backends.extend_from_slice(rest);
        self.backends.shrink_to_fit();
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
        for (frontend, access) in admitted {
            self.put_frontend(*frontend, *access);
        }
        self.frontends.shrink_to_fit();
    }

    /// Takes in that a frontend leads here.
    pub fn put_frontend(&mut self, frontend: Frontend, access: Access) {
        match self.frontends.iter_mut().find(|(known, _)| *known == frontend) {
            Some(known) => known.1 = access,
            None => self.frontends.push((frontend, access)),
        }
    }

    /// Takes in how backends are chosen.
    pub fn want(&mut self, wanted: &Port) {
        let asks_for_local = |access: &Access| access.local_for_all || access.local_for_outside;
        self.asks_for_local = wanted.frontends.values().any(asks_for_local);
        self.affinity = wanted.affinity;
        self.algorithm = wanted.algorithm;
        self.criteria = wanted.criteria;
    }

    /// Its frontends that are not wanted any more.
    pub fn give_up(&mut self, wanted: &Port) -> Vec<Frontend> {
        let gone = self.frontends.extract_if(.., |(f, _)| !wanted.frontends.contains_key(f));
        gone.map(|(frontend, _)| frontend).collect()
    }

    /// Says how much room the slots for these would take.
    pub fn note(&mut self, [cluster, local]: &[Candidates; 2], slots: &mut Slots) {
        slots.note(&mut self.cluster, self.algorithm, cluster);
        slots.note(&mut self.local, self.algorithm, local);
    }

    /// Has slots lead to its candidates. False if there was no room for that.
    pub fn fill(
        &mut self,
        now: Instant,
        candidates: &[Candidates; 2],
        slots: &mut Slots,
        ops: &mut Vec<Op>,
    ) -> bool {
        let mut done = true;
        for (part, candidates) in [&mut self.cluster, &mut self.local].into_iter().zip(candidates) {
            done &= slots.fill(now, part, self.algorithm, candidates, ops);
        }
        done
    }

    /// The backends to choose from: of the cluster, and of this node if that is asked for.
    pub fn candidates(&self) -> [Candidates; 2] {
        let local = if self.asks_for_local {
            Candidates::of(&self.backends, |entry| entry.usable_local)
        } else {
            Candidates::default()
        };
        [Candidates::of(&self.backends, |entry| entry.usable), local]
    }

    /// The frontends that lead here.
    pub fn led(&self) -> Vec<Frontend> {
        self.frontends.iter().map(|(frontend, _)| *frontend).collect()
    }

    /// Where one of its frontends leads.
    pub fn lead(&self, frontend: Frontend) -> Lead {
        let known = self.frontends.iter().find(|(known, _)| *known == frontend);
        let access = known.map(|(_, access)| *access).unwrap_or_default();
        Lead {
            id: self.id,
            cluster: self.cluster.choice,
            local: self.local.choice,
            affinity: ticks(self.affinity.into()),
            flags: flags(access) | self.algorithm.flags(),
        }
    }
}

/// Writes of a Service port's backends.
struct BackendWrites<'a> {
    family: IpFamily,
    service: u32,
    counted: bool,
    ops: &'a mut Vec<Op>,
}

impl BackendWrites<'_> {
    /// A backend under its number, written if it is another than what is there.
    fn put(
        &mut self,
        (number, generation): (u32, u16),
        there: Option<BackendEntry>,
        backend: &Backend,
    ) -> Numbered {
        let entry = BackendEntry {
            address: backend.address,
            generation,
            serving: backend.serving,
            local: backend.local,
            usable: backend.usable,
            usable_local: backend.usable_local,
            counted: self.counted,
            weight: backend.weight,
            service: self.service,
        };
        if there != Some(entry) {
            self.ops.push(Op::Backend { family: self.family, number, backend: entry });
        }
        (number, entry)
    }

    /// The same of one that has its number.
    fn again(&mut self, held: &mut Numbered, backend: &Backend) {
        let (number, entry) = *held;
        *held = self.put((number, entry.generation), Some(entry), backend);
    }
}

/// Gives numbers to the wanted backends, those that were there their own. Also says which are not wanted any more,
/// and whether there were numbers for all. Both are sorted.
fn merge(
    before: Vec<Numbered>,
    wanted: &[Backend],
    numbers: &mut Numbers,
    writes: &mut BackendWrites<'_>,
) -> (Vec<Numbered>, Leaving, bool) {
    let mut before = before.into_iter().peekable();
    let (mut merged, mut leaving, mut all) = (Vec::new(), Vec::new(), true);
    for backend in wanted {
        let is_gone = |held: &Numbered| held.1.address < backend.address;
        leaving.extend(std::iter::from_fn(|| before.next_if(is_gone)));
        let known = before.next_if(|(_, entry)| entry.address == backend.address);
        let own = known.map(|(number, entry)| (number, entry.generation));
        match own.or_else(|| numbers.take_with_generation()) {
            Some(place) => merged.push(writes.put(place, known.map(|known| known.1), backend)),
            None => all = false,
        }
    }
    leaving.extend(before);
    (merged, leaving, all)
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
