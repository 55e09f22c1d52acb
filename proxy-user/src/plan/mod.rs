//! From what the kernel should hold to the writes that make it so: wanted minus actual, in an order in
//! which no packet ever sees half of a change.
//!
//! The planner remembers what the maps hold. It learns that either by having planned it or, at
//! start-up, by reading the maps ([`Planner::recover`]); from then on start-up, resync and steady state
//! are the same call. It also hands out what the tables need: Service port ids, backend numbers and
//! runs of slots. No I/O here: the result is a list of [`Op`]s for the one writer.

mod allocate;
mod frontends;
mod held;
mod op;
mod recover;
mod slots;
mod spread;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{BuildHasher, Hash};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use foldhash::quality::FixedState;
use ipnet::IpNet;

pub(crate) use self::allocate::Numbers;
pub(crate) use self::op::flags_of;
pub use self::op::{BackendEntry, Capacity, Change, Lead, Op, Refusal};
pub use self::recover::{Actual, ActualBackend, ActualService};
use crate::desired::{Criteria, Frontend, Patch, Port, PortId};
use crate::model::IpFamily;
use frontends::Frontends;
use held::{Held, Leaving};
use slots::{Candidates, Slots};

/// How long a number or a slot stays out of use after its last reader could have seen it. A packet
/// takes microseconds; a second is beyond doubt.
const GRACE: Duration = Duration::from_secs(1);

/// How many Service ports at most get tables of another length with one plan.
const AT_ONCE: usize = 256;

/// A hash that tells one thing that was planned from another; never 0.
fn digest(what: &impl Hash) -> u64 {
    FixedState::default().hash_one(what).max(1)
}

/// A value for each family.
type PerFamily<T> = HashMap<IpFamily, T>;

fn per_family<T>(value: impl Fn() -> T) -> PerFamily<T> {
    [IpFamily::V4, IpFamily::V6].map(|family| (family, value())).into()
}

/// What the kernel holds, and what is free.
pub struct Planner {
    held: HashMap<PortId, Held>,
    names: HashMap<u32, PortId>,
    frontends: Frontends,
    ids: Numbers,
    slots: Slots,
    backends: PerFamily<Numbers>,
    /// How many more source ranges a family's table takes.
    ranges: PerFamily<usize>,
    /// The ranges that pods are not masqueraded for, as the maps hold them.
    exceptions: BTreeSet<IpNet>,
    /// Service ports whose tables are not as long as they may be now, or longer.
    unequal: BTreeSet<PortId>,
    capacity: Capacity,
}

/// A Service port whose change was taken in.
struct Entry {
    /// What it gives up when its frontends lead elsewhere.
    leaving: Leaving,
    /// What tells this plan from others; 0 if not all of it could be done.
    mark: u64,
}

/// How much of each table is in use.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Use {
    /// The table's name.
    pub table: String,
    /// How many of its elements are in use.
    pub used: usize,
    /// How many it has.
    pub size: usize,
}

impl Planner {
    /// A planner for empty tables.
    pub fn new(capacity: Capacity) -> Self {
        // A sixteenth is for the node's own addresses.
        let entries = (capacity.services - capacity.services / 16) as usize;
        Self {
            held: HashMap::new(),
            names: HashMap::new(),
            frontends: Frontends::new(entries),
            // Id 0 is "no Service": marks have it.
            ids: Numbers::new(1, capacity.services),
            slots: Slots::new(capacity.slots),
            backends: per_family(|| Numbers::new(0, capacity.backends)),
            ranges: per_family(|| capacity.ranges as usize),
            exceptions: BTreeSet::new(),
            unequal: BTreeSet::new(),
            capacity,
        }
    }

    /// How much of each table is in use.
    pub fn usage(&self) -> Vec<Use> {
        let Capacity { services, backends, ranges, .. } = self.capacity;
        let of =
            |table: &str, used, size: u32| Use { table: table.into(), used, size: size as usize };
        let (v4, v6) = (IpFamily::V4, IpFamily::V6);
        vec![
            of("services_v4", self.frontends.used(v4), services),
            of("services_v6", self.frontends.used(v6), services),
            of("names", self.ids.used(), services),
            of("slots", self.slots.used() as usize, self.slots.capacity()),
            of("backends_v4", self.backends[&v4].used(), backends),
            of("backends_v6", self.backends[&v6].used(), backends),
            of("ranges_v4", ranges as usize - self.ranges[&v4], ranges),
            of("ranges_v6", ranges as usize - self.ranges[&v6], ranges),
        ]
    }

    /// Plans the marks of the node's own addresses, with the flags of each.
    pub fn plan_node(&mut self, addresses: &BTreeMap<IpAddr, u32>) -> Vec<Op> {
        let mut ops = Vec::new();
        self.frontends.set_node(addresses, &mut ops);
        ops
    }

    /// Plans the ranges that pods are not masqueraded for.
    pub fn plan_exceptions(&mut self, wanted: &BTreeSet<IpNet>) -> Vec<Op> {
        let allow =
            wanted.difference(&self.exceptions).map(|range| Op::Allow { id: 0, range: *range });
        let forbid =
            self.exceptions.difference(wanted).map(|range| Op::Forbid { id: 0, range: *range });
        let ops = allow.chain(forbid).collect();
        self.reserve_ranges(&self.exceptions.clone(), usize::saturating_add);
        self.reserve_ranges(wanted, usize::saturating_sub);
        self.exceptions.clone_from(wanted);
        ops
    }

    /// Counts the room for source ranges anew.
    fn reserve_ranges(&mut self, ranges: &BTreeSet<IpNet>, count: fn(usize, usize) -> usize) {
        for range in ranges {
            let room = self.ranges.get_mut(&IpFamily::of(range.addr())).expect("both are there");
            *room = count(*room, 1);
        }
    }

    /// The Service ports that the kernel holds.
    pub fn ports(&self) -> impl Iterator<Item = &PortId> {
        self.held.keys()
    }

    /// The Service port of a number.
    pub fn name_of(&self, id: u32) -> Option<&PortId> {
        self.names.get(&id)
    }

    /// The addresses of all backends on other nodes that the kernel holds.
    pub fn remote_backends(&self) -> HashSet<IpAddr> {
        let all = self.held.values().flat_map(|held| &held.backends);
        all.filter(|(_, entry)| !entry.local).map(|(_, entry)| entry.address.ip()).collect()
    }

    /// The `ClusterIPs` that the kernel holds, without those that are the node's own addresses too.
    pub fn cluster_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.frontends.cluster_ips()
    }

    /// Writes backends again as they are: another way leads to those addresses.
    pub fn rewrite(&self, is_concerned: impl Fn(IpAddr) -> bool) -> Vec<Op> {
        let mut ops = Vec::new();
        for (port, held) in &self.held {
            let concerned = held.backends.iter().filter(|(_, e)| is_concerned(e.address.ip()));
            ops.extend(concerned.map(|(number, entry)| Op::Backend {
                family: port.family,
                number: *number,
                backend: *entry,
            }));
        }
        ops
    }

    /// Whether tables are still to be brought to another length, by plans to come.
    pub fn is_settled(&self) -> bool {
        self.unequal.is_empty()
    }

    /// Plans changes of Service ports, each to what is wanted; `None` removes one. `now` orders the reuse
    /// of what becomes free.
    ///
    /// Together, so that a frontend that passes from one Service port to another is led there in one
    /// switch: first all claims, then all that is given up.
    pub fn plan(
        &mut self,
        now: Instant,
        changes: &[Change],
        refusals: &mut Vec<Refusal>,
    ) -> Vec<Op> {
        self.reclaim(now);
        let mut ops = Vec::new();
        let mut entered = Vec::new();
        for (port, wanted) in changes {
            let Some(wanted) = wanted else { continue };
            if let Some(entry) = self.enter(port, wanted, &mut ops, refusals) {
                entered.push((port, wanted, entry));
            }
        }
        // Before anyone takes room: all that is to come is known.
        let has_moved = self.slots.choose_level();
        for (port, _, entry) in &mut entered {
            let candidates = self.held[*port].candidates();
            self.fill(now, port, &candidates, entry, &mut ops, refusals);
        }
        for (port, wanted, entry) in &entered {
            self.lead(port, wanted, entry, &mut ops, refusals);
        }
        for (port, wanted, entry) in entered {
            self.leave(now, port, wanted, entry.leaving, &mut ops);
        }
        for (port, _) in changes.iter().filter(|(_, wanted)| wanted.is_none()) {
            self.remove(now, port, &mut ops);
        }
        for (_, wanted) in changes {
            self.tell_taken(wanted.as_ref(), refusals);
        }
        let has_moved = self.slots.choose_level() || has_moved;
        self.equalise(now, has_moved, &mut ops);
        ops
    }

    /// By what the backends of a Service port were judged when they were planned last; `None` if that plan is not
    /// in force whole, so that no patch can be put on it.
    pub fn criteria(&self, port: &PortId) -> Option<Criteria> {
        self.held.get(port).filter(|held| held.planned != 0).map(|held| held.criteria)
    }

    /// Plans changes of some backends of Service ports that are held, before [`Self::plan`]: what is looked at anew is
    /// those, and what is written anew the run of all backends' numbers.
    pub fn patch(
        &mut self,
        now: Instant,
        patches: &[Patch],
        refusals: &mut Vec<Refusal>,
    ) -> Vec<Op> {
        self.reclaim(now);
        let mut ops = Vec::new();
        for patch in patches {
            self.patch_port(now, patch, &mut ops, refusals);
        }
        ops
    }

    fn patch_port(
        &mut self,
        now: Instant,
        patch: &Patch,
        ops: &mut Vec<Op>,
        refusals: &mut Vec<Refusal>,
    ) {
        let Some(held) = self.held.get_mut(&patch.port) else { return };
        let numbers = self.backends.get_mut(&patch.port.family).expect("both families are there");
        let (leaving, all) = held.patch_backends(numbers, patch, ops);
        if !all {
            refusals.push(Refusal::Full { port: patch.port.clone(), table: "backends" });
        }
        let candidates = held.candidates();
        held.note(&candidates, &mut self.slots);
        let mark = if all { digest(&(held.planned, &patch.addresses)) } else { 0 };
        let mut entry = Entry { leaving, mark };
        self.fill(now, &patch.port, &candidates, &mut entry, ops, refusals);
        let held = self.held.get_mut(&patch.port).expect("it is held");
        held.planned = entry.mark;
        for frontend in held.led() {
            self.settle(frontend, ops);
        }
        self.withdraw(now, patch.port.family, entry.leaving, ops);
    }

    /// Gives back what has been out of use for long enough.
    fn reclaim(&mut self, now: Instant) {
        self.ids.reclaim(now);
        self.slots.reclaim(now);
        for numbers in self.backends.values_mut() {
            numbers.reclaim(now);
        }
    }

    /// Brings tables to the length that there is room for, some with each plan.
    fn equalise(&mut self, now: Instant, has_moved: bool, ops: &mut Vec<Op>) {
        if has_moved {
            let is_other =
                |held: &&Held| held.parts().any(|part| self.slots.is_of_other_level(part));
            let others = self.held.iter().filter(|(_, held)| is_other(held));
            self.unequal = others.map(|(port, _)| port.clone()).collect();
        }
        for _ in 0..AT_ONCE.min(self.unequal.len()) {
            let Some(port) = self.unequal.pop_first() else { return };
            let Some(held) = self.held.get_mut(&port) else { continue };
            held.fill(now, &held.candidates(), &mut self.slots, ops);
            let has_room = !held.parts().any(|part| self.slots.is_of_other_level(part));
            // Whatever has moved: what it had before is given back.
            held.led().into_iter().for_each(|frontend| self.settle(frontend, ops));
            if !has_room {
                // There is none before others have made some.
                self.unequal.insert(port);
                return;
            }
        }
    }

    /// Takes in what is wanted of a Service port, but for where its frontends lead and what it gives up. `None` if
    /// nothing changes, or there is no number for a new one.
    fn enter(
        &mut self,
        port: &PortId,
        wanted: &Port,
        ops: &mut Vec<Op>,
        refusals: &mut Vec<Refusal>,
    ) -> Option<Entry> {
        let mark = digest(wanted);
        if self.held.get(port).is_some_and(|held| held.planned == mark) {
            return None;
        }
        let mut is_whole = true;
        let mut full = |table| {
            is_whole = false;
            refusals.push(Refusal::Full { port: port.clone(), table });
        };
        let Some(mut held) = self.held.remove(port).or_else(|| self.admit(port, ops)) else {
            full("services");
            return None;
        };
        let numbers = self.backends.get_mut(&port.family).expect("both families are there");
        let (leaving, all) = held.take_backends(port.family, numbers, wanted, ops);
        if !all {
            full("backends");
        }
        let room = self.ranges.get_mut(&port.family).expect("both families are there");
        if !held.allow(room, wanted, ops) {
            full("source ranges");
        }
        held.want(wanted);
        held.note(&held.candidates(), &mut self.slots);
        self.held.insert(port.clone(), held);
        Some(Entry { leaving, mark: if is_whole { mark } else { 0 } })
    }

    /// Fills slots for a Service port that was taken in.
    fn fill(
        &mut self,
        now: Instant,
        port: &PortId,
        candidates: &[Candidates; 2],
        entry: &mut Entry,
        ops: &mut Vec<Op>,
        refusals: &mut Vec<Refusal>,
    ) {
        let held = self.held.get_mut(port).expect("it was taken in");
        if !held.fill(now, candidates, &mut self.slots, ops) {
            entry.mark = 0;
            refusals.push(Refusal::Full { port: port.clone(), table: "slots" });
        }
        if held.parts().any(|part| self.slots.is_of_other_level(part)) {
            self.unequal.insert(port.clone());
        }
    }

    /// Leads the frontends of a Service port to what was filled for it.
    fn lead(
        &mut self,
        port: &PortId,
        wanted: &Port,
        entry: &Entry,
        ops: &mut Vec<Op>,
        refusals: &mut Vec<Refusal>,
    ) {
        let refused = self.frontends.without_room(port.family, wanted.frontends.keys());
        let held = self.held.get_mut(port).expect("it was taken in");
        held.lead_to(wanted, &refused);
        held.planned = entry.mark;
        if !refused.is_empty() {
            held.planned = 0;
            refusals.push(Refusal::Full { port: port.clone(), table: "services" });
        }
        for frontend in wanted.frontends.keys().filter(|frontend| !refused.contains(frontend)) {
            self.frontends.claim(*frontend, port, &wanted.created);
            self.settle(*frontend, ops);
        }
    }

    /// A new Service port: a number and a name. `None` if there is no number.
    fn admit(&mut self, port: &PortId, ops: &mut Vec<Op>) -> Option<Held> {
        let id = self.ids.take()?;
        ops.push(Op::Name { id, port: port.clone() });
        self.names.insert(id, port.clone());
        Some(Held::new(id))
    }

    /// Says who claims the frontends of a Service port in vain: itself, or one that had them before.
    fn tell_taken(&self, wanted: Option<&Port>, refusals: &mut Vec<Refusal>) {
        for frontend in wanted.into_iter().flat_map(|wanted| wanted.frontends.keys()) {
            let Some(holder) = self.frontends.winner(*frontend) else { continue };
            let losers = self.frontends.claimants(*frontend).filter(|claimant| *claimant != holder);
            refusals.extend(losers.map(|port| Refusal::Taken {
                port: port.clone(),
                frontend: *frontend,
                holder: holder.clone(),
            }));
        }
    }

    /// Leads a frontend to the Service port whose claim counts.
    fn settle(&mut self, frontend: Frontend, ops: &mut Vec<Op>) {
        let held = &self.held;
        self.frontends.settle(frontend, |port| held[port].lead(frontend), ops);
    }

    /// After the switch: frontends and backends that are not wanted any more are given up.
    fn leave(
        &mut self,
        now: Instant,
        port: &PortId,
        wanted: &Port,
        leaving: Leaving,
        ops: &mut Vec<Op>,
    ) {
        let held = self.held.get_mut(port).expect("it is held");
        for frontend in held.give_up(wanted) {
            self.frontends.release(frontend, port);
            self.settle(frontend, ops);
        }
        self.withdraw(now, port.family, leaving, ops);
        let held = self.held.get_mut(port).expect("it is held");
        held.strays.drain(..).for_each(|part| self.slots.remove(now, &part));
        let room = self.ranges.get_mut(&port.family).expect("both families are there");
        held.forbid(room, wanted, ops);
    }

    /// Writes that backends are gone, and gives their numbers back.
    fn withdraw(&mut self, now: Instant, family: IpFamily, leaving: Leaving, ops: &mut Vec<Op>) {
        let numbers = self.backends.get_mut(&family).expect("both families are there");
        for (number, entry) in leaving {
            ops.push(Op::Backend { family, number, backend: entry.withdrawn() });
            numbers.retire(now + GRACE, number);
        }
    }

    fn remove(&mut self, now: Instant, port: &PortId, ops: &mut Vec<Op>) {
        let Some(held) = self.held.get_mut(port) else { return };
        let leaving = std::mem::take(&mut held.backends);
        self.leave(now, port, &Port::default(), leaving, ops);
        let held = self.held.remove(port).expect("it is held");
        held.parts().for_each(|part| self.slots.remove(now, part));
        ops.push(Op::Unname { id: held.id });
        self.names.remove(&held.id);
        self.ids.retire(now + GRACE, held.id);
    }
}
