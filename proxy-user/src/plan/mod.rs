//! From what the kernel should hold to the writes that make it so: wanted minus actual, in an order in
//! which no packet ever sees half of a change.
//!
//! The planner remembers what the maps hold. It learns that either by having planned it or, at
//! start-up, by reading the maps ([`Planner::recover`]); from then on start-up, resync and steady state
//! are the same call. It also hands out what the tables need: Service port ids, backend numbers and
//! runs of slots. No I/O here: the result is a list of [`Op`]s for the one writer.

mod allocate;
mod frontends;
mod op;
mod recover;
mod spread;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use proxy_common::settings::ticks;
use proxy_common::tables::{Range, ServiceValue};

pub(crate) use self::op::flags_of;
pub use self::op::{BackendEntry, Capacity, Change, Lead, Op, Refusal};
pub use self::recover::{Actual, ActualBackend, ActualService};
use crate::desired::{Access, Backend, Frontend, Port, PortId};
use crate::model::IpFamily;
use allocate::{Numbers, Runs};
use frontends::Frontends;
use spread::{sparse, spread};

/// How long a number or a slot stays out of use after its last reader could have seen it. A packet
/// takes microseconds; a second is beyond doubt.
const GRACE: Duration = Duration::from_secs(1);

/// A Service port as the kernel holds it.
#[derive(Clone, Debug)]
struct Held {
    id: u32,
    wanted: Port,
    /// Its slots: the cluster's backends, then this node's.
    range: Range,
    /// How many of them are the cluster's.
    cluster: u32,
    /// What they were filled with: [`Filling::mark`].
    filling: u64,
    /// It was taken over and not planned since: nothing of it is sure.
    adopted: bool,
    /// Runs of slots that frontends led to when it was taken over, beside its own.
    strays: Vec<Range>,
    /// The source ranges that the maps hold.
    ranges: BTreeSet<IpNet>,
    /// Backend numbers by address, with the flags that were written.
    numbers: HashMap<SocketAddr, (u32, BackendEntry)>,
}

/// What the kernel holds, and what is free.
pub struct Planner {
    held: HashMap<PortId, Held>,
    frontends: Frontends,
    /// How many frontends and marks a family's table holds.
    entries: usize,
    ids: Numbers,
    runs: Runs,
    backends: HashMap<IpFamily, Numbers>,
    /// How many more source ranges a family's table takes.
    ranges: HashMap<IpFamily, usize>,
    /// The ranges that pods are not masqueraded for, as the maps hold them.
    exceptions: BTreeSet<IpNet>,
}

impl Planner {
    /// A planner for empty tables.
    pub fn new(capacity: Capacity) -> Self {
        let backends = [IpFamily::V4, IpFamily::V6]
            .map(|family| (family, Numbers::new(0, capacity.backends)))
            .into();
        Self {
            held: HashMap::new(),
            frontends: Frontends::default(),
            // A sixteenth is for the node's own addresses.
            entries: (capacity.services - capacity.services / 16) as usize,
            ranges: [IpFamily::V4, IpFamily::V6].map(|f| (f, capacity.ranges as usize)).into(),
            exceptions: BTreeSet::new(),
            // Id 0 is "no Service": marks have it.
            ids: Numbers::new(1, capacity.services),
            runs: Runs::new(capacity.slots),
            backends,
        }
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

    /// The addresses of all backends on other nodes that the kernel holds.
    pub fn remote_backends(&self) -> HashSet<IpAddr> {
        let all = self.held.values().flat_map(|held| held.numbers.values());
        all.filter(|(_, entry)| !entry.local).map(|(_, entry)| entry.address.ip()).collect()
    }

    /// Writes backends again as they are: another way leads to those addresses.
    pub fn rewrite(&self, is_concerned: impl Fn(IpAddr) -> bool) -> Vec<Op> {
        let mut ops = Vec::new();
        for (port, held) in &self.held {
            let concerned = held.numbers.values().filter(|(_, e)| is_concerned(e.address.ip()));
            ops.extend(concerned.map(|(number, entry)| Op::Backend {
                family: port.family,
                number: *number,
                backend: *entry,
            }));
        }
        ops
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
            match self.enter(now, port, wanted, &mut ops) {
                Ok(true) => entered.push((port, wanted)),
                Ok(false) => {}
                Err(refusal) => refusals.push(*refusal),
            }
        }
        for (port, wanted) in &entered {
            self.leave(now, port, wanted, &mut ops);
        }
        for (port, _) in changes.iter().filter(|(_, wanted)| wanted.is_none()) {
            self.remove(now, port, &mut ops);
        }
        for (_, wanted) in changes {
            self.tell_taken(wanted.as_ref(), refusals);
        }
        ops
    }

    /// Gives back what has been out of use for long enough.
    fn reclaim(&mut self, now: Instant) {
        self.ids.reclaim(now);
        self.runs.reclaim(now);
        for numbers in self.backends.values_mut() {
            numbers.reclaim(now);
        }
    }

    /// Brings a Service port to what is wanted, but for what it gives up. False if nothing changes.
    fn enter(
        &mut self,
        now: Instant,
        port: &PortId,
        wanted: &Port,
        ops: &mut Vec<Op>,
    ) -> Result<bool, Box<Refusal>> {
        if self.held.get(port).is_some_and(|held| !held.adopted && held.wanted == *wanted) {
            return Ok(false);
        }
        if !self.frontends.has_room(port.family, wanted.frontends.len(), self.entries) {
            return Err(Box::new(Refusal::Full { port: port.clone(), table: "services" }));
        }
        let mut held = match self.held.remove(port) {
            Some(held) => held,
            None => self.admit(port, ops)?,
        };
        let result = self.put_backends(now, port, &mut held, wanted, ops);
        if result.is_ok() {
            held.wanted.frontends.extend(wanted.frontends.clone());
            held.wanted.affinity = wanted.affinity;
            held.wanted.algorithm = wanted.algorithm;
        }
        self.held.insert(port.clone(), held);
        result?;
        for frontend in wanted.frontends.keys() {
            self.frontends.claim(*frontend, port, &wanted.created);
            self.settle(*frontend, ops);
        }
        Ok(true)
    }

    /// A new Service port: a number and a name.
    fn admit(&mut self, port: &PortId, ops: &mut Vec<Op>) -> Result<Held, Box<Refusal>> {
        let full = || Box::new(Refusal::Full { port: port.clone(), table: "services" });
        let id = self.ids.take().ok_or_else(full)?;
        ops.push(Op::Name { id, port: port.clone() });
        Ok(Held {
            id,
            wanted: Port::default(),
            range: Range::default(),
            cluster: 0,
            filling: Filling::default().mark(),
            adopted: false,
            strays: Vec::new(),
            ranges: BTreeSet::new(),
            numbers: HashMap::new(),
        })
    }

    /// Writes new and changed backends, then, if the usable ones are others than before, a fresh run of
    /// slots. Nothing leads there yet.
    fn put_backends(
        &mut self,
        now: Instant,
        port: &PortId,
        held: &mut Held,
        wanted: &Port,
        ops: &mut Vec<Op>,
    ) -> Result<(), Box<Refusal>> {
        let full = |table| Box::new(Refusal::Full { port: port.clone(), table });
        let numbers = self.backends.get_mut(&port.family).expect("both families are there");
        let missing =
            wanted.backends.iter().filter(|b| !held.numbers.contains_key(&b.address)).count();
        if numbers.free() < missing {
            return Err(full("backends"));
        }
        let fresh =
            wanted.source_ranges.iter().filter(|range| !held.ranges.contains(range)).count();
        let room = self.ranges.get_mut(&port.family).expect("both families are there");
        if *room < fresh {
            return Err(full("source ranges"));
        }
        let (filling, run) =
            find_room(&mut self.runs, held, wanted).ok_or_else(|| full("slots"))?;
        *room -= fresh;
        held.number_backends(port.family, numbers, wanted, ops);
        if let Some(run) = run {
            self.runs.retire(now + GRACE, held.range);
            held.fill_slots(run, &filling, ops);
        }
        for range in &wanted.source_ranges {
            if held.ranges.insert(*range) {
                ops.push(Op::Allow { id: held.id, range: *range });
            }
        }
        Ok(())
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
    fn leave(&mut self, now: Instant, port: &PortId, wanted: &Port, ops: &mut Vec<Op>) {
        let held = self.held.get_mut(port).expect("it is held");
        let had = std::mem::replace(&mut held.wanted, wanted.clone()).frontends;
        for frontend in had.keys().filter(|frontend| !wanted.frontends.contains_key(frontend)) {
            self.frontends.release(*frontend, port);
            self.settle(*frontend, ops);
        }
        let held = self.held.get_mut(port).expect("it is held");
        let numbers = self.backends.get_mut(&port.family).expect("both families are there");
        let staying: BTreeSet<SocketAddr> = wanted.backends.iter().map(|b| b.address).collect();
        let mut gone: Vec<SocketAddr> =
            held.numbers.keys().filter(|address| !staying.contains(address)).copied().collect();
        gone.sort_unstable();
        for address in gone {
            let (number, entry) = held.numbers.remove(&address).expect("just found");
            ops.push(Op::Backend { family: port.family, number, backend: entry.withdrawn() });
            numbers.retire(now + GRACE, number);
        }
        held.adopted = false;
        held.strays.drain(..).for_each(|run| self.runs.retire(now + GRACE, run));
        let id = held.id;
        let closed = held.ranges.extract_if(.., |range| !wanted.source_ranges.contains(range));
        let room = self.ranges.get_mut(&port.family).expect("both families are there");
        ops.extend(closed.map(|range| {
            *room += 1;
            Op::Forbid { id, range }
        }));
    }

    fn remove(&mut self, now: Instant, port: &PortId, ops: &mut Vec<Op>) {
        if !self.held.contains_key(port) {
            return;
        }
        self.leave(now, port, &Port::default(), ops);
        let held = self.held.remove(port).expect("it is held");
        self.runs.retire(now + GRACE, held.range);
        ops.push(Op::Unname { id: held.id });
        self.ids.retire(now + GRACE, held.id);
    }
}

/// What a Service port's slots are to hold, and a fresh run for that if it is not what they hold.
/// `None` if there is no room.
fn find_room(runs: &mut Runs, held: &Held, wanted: &Port) -> Option<(Filling, Option<Range>)> {
    let filling = Filling::of(wanted, |backends| spread(wanted.algorithm, backends));
    if !held.needs_slots(&filling) {
        return Some((filling, None));
    }
    if let Some(run) = runs.take(filling.len()) {
        return Some((filling, Some(run)));
    }
    // Served in a plain way is better than not at all.
    let filling = Filling::of(wanted, sparse);
    if !held.needs_slots(&filling) {
        return Some((filling, None));
    }
    let run = runs.take(filling.len())?;
    Some((filling, Some(run)))
}

impl Held {
    /// Whether other backends are to be in the slots than are.
    fn needs_slots(&self, filling: &Filling) -> bool {
        self.filling != filling.mark()
            || filling.slots().any(|address| !self.numbers.contains_key(address))
    }

    /// Gives each backend its number, and writes it if it is new or has changed.
    fn number_backends(
        &mut self,
        family: IpFamily,
        numbers: &mut Numbers,
        wanted: &Port,
        ops: &mut Vec<Op>,
    ) {
        for backend in &wanted.backends {
            let (number, generation) = match self.numbers.get(&backend.address) {
                Some((number, entry)) => (*number, entry.generation),
                None => numbers.take_with_generation().expect("enough are free"),
            };
            let backend = entry(backend, generation, self.id);
            if self.numbers.insert(backend.address, (number, backend)) != Some((number, backend)) {
                ops.push(Op::Backend { family, number, backend });
            }
        }
    }

    /// Fills a run with the backends that are to be in the slots.
    fn fill_slots(&mut self, run: Range, filling: &Filling, ops: &mut Vec<Op>) {
        for (index, address) in (run.first..).zip(filling.slots()) {
            ops.push(Op::Slot { index, number: self.numbers[address].0 });
        }
        self.range = run;
        self.filling = filling.mark();
        self.cluster = u32::try_from(filling.cluster.len()).expect("no more than all");
    }

    /// Where one of its frontends leads.
    fn lead(&self, frontend: Frontend) -> Lead {
        let Range { first, count } = self.range;
        let access = self.wanted.frontends.get(&frontend).copied().unwrap_or_default();
        let local = count - self.cluster;
        let local_first = if local == 0 { 0 } else { first + self.cluster };
        Lead {
            id: self.id,
            cluster: Range { first, count: self.cluster },
            local: Range { first: local_first, count: local },
            affinity: ticks(self.wanted.affinity.into()),
            flags: flags(access) | self.wanted.algorithm.flags(),
        }
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
fn access(flags: u32) -> Access {
    let mut access = Access::default();
    for field in ACCESS {
        let (set, flag) = field(&mut access);
        *set = flags & flag != 0;
    }
    access
}

fn entry(backend: &Backend, generation: u16, service: u32) -> BackendEntry {
    BackendEntry {
        address: backend.address,
        generation,
        serving: backend.serving,
        local: backend.local,
        usable: backend.usable,
        usable_local: backend.usable_local,
        weight: backend.weight,
        service,
    }
}

/// The backends in a Service port's slots, slot by slot.
#[derive(Default, Hash)]
struct Filling {
    /// The whole cluster's.
    cluster: Vec<SocketAddr>,
    /// This node's, if one of the frontends asks for them.
    local: Vec<SocketAddr>,
}

impl Filling {
    /// The filling for a Service port, as `spread` has backends share slots.
    fn of(port: &Port, spread: impl Fn(&[(SocketAddr, u16)]) -> Vec<usize>) -> Self {
        let fill = |is_usable: fn(&Backend) -> bool| {
            let usable = port.backends.iter().filter(|backend| is_usable(backend));
            let backends: Vec<(SocketAddr, u16)> = usable.map(|b| (b.address, b.weight)).collect();
            let slots = spread(&backends).into_iter();
            slots.map(|position| backends[position].0).collect()
        };
        let asks_for_local = |access: &Access| access.local_for_all || access.local_for_outside;
        let local = if port.frontends.values().any(asks_for_local) {
            fill(|backend| backend.usable_local)
        } else {
            Vec::new()
        };
        Self { cluster: fill(|backend| backend.usable), local }
    }

    fn len(&self) -> u32 {
        u32::try_from(self.cluster.len() + self.local.len()).unwrap_or(u32::MAX)
    }

    fn slots(&self) -> impl Iterator<Item = &SocketAddr> {
        self.cluster.iter().chain(&self.local)
    }

    /// A number that tells fillings apart, instead of all those addresses.
    fn mark(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}
