//! From what the kernel should hold to the writes that make it so: wanted minus actual, in an order in
//! which no packet ever sees half of a change.
//!
//! The planner remembers what the maps hold. It learns that either by having planned it or, at
//! start-up, by reading the maps ([`Planner::recover`]); from then on start-up, resync and steady state
//! are the same call. It also hands out what the tables need: Service port ids, backend numbers and
//! runs of slots. No I/O here: the result is a list of [`Op`]s for the one writer.

mod allocate;
mod frontends;
mod recover;

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use proxy_common::tables::Range;

pub use self::recover::{Actual, ActualBackend, ActualService};
use crate::desired::{Frontend, Port, PortId};
use crate::model::IpFamily;
use allocate::{Numbers, Runs};
use frontends::Frontends;

/// How long a number or a slot stays out of use after its last reader could have seen it. A packet
/// takes microseconds; a second is beyond doubt.
const GRACE: Duration = Duration::from_secs(1);

/// One write to the kernel's maps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Writes a backend; not serving and without address if it is withdrawn.
    Backend {
        /// The family's table.
        family: IpFamily,
        /// The backend's number.
        number: u32,
        /// What to write.
        backend: BackendEntry,
    },
    /// Writes a slot.
    Slot {
        /// The slot.
        index: u32,
        /// The backend's number.
        number: u32,
    },
    /// Names a Service port.
    Name {
        /// Its number.
        id: u32,
        /// Its identity.
        port: PortId,
    },
    /// Forgets a Service port's name.
    Unname {
        /// Its number.
        id: u32,
    },
    /// Leads a frontend to a run of slots. This is the switch.
    Lead {
        /// The frontend.
        frontend: Frontend,
        /// The Service port's number.
        id: u32,
        /// The run.
        range: Range,
    },
    /// Removes a frontend.
    Remove {
        /// The frontend.
        frontend: Frontend,
    },
    /// Marks an address as a VIP: ports that it does not have are refused (KP-40).
    MarkVip {
        /// The address.
        vip: IpAddr,
    },
    /// Takes the mark away.
    UnmarkVip {
        /// The address.
        vip: IpAddr,
    },
}

/// A backend as it is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BackendEntry {
    /// Its address and port.
    pub address: SocketAddr,
    /// The generation of its number.
    pub generation: u16,
    /// Keeps the flows that it has.
    pub serving: bool,
    /// Runs on this node.
    pub local: bool,
    /// The Service port's number.
    pub service: u32,
}

/// What can't be done, in words for the operator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// A table is full: the Service port keeps what it had.
    Full {
        /// The Service port.
        port: PortId,
        /// The table.
        table: &'static str,
    },
    /// Another Service's port has the frontend.
    Taken {
        /// The Service port that does not get it.
        port: PortId,
        /// The frontend.
        frontend: Frontend,
        /// Who has it.
        holder: PortId,
    },
}

/// How much each table holds.
#[derive(Clone, Copy, Debug)]
pub struct Capacity {
    /// Service ports, by id.
    pub services: u32,
    /// Slots.
    pub slots: u32,
    /// Backends of each family.
    pub backends: u32,
}

/// A Service port as the kernel holds it.
#[derive(Clone, Debug)]
struct Held {
    id: u32,
    wanted: Port,
    range: Range,
    /// Backend numbers by address, with the flags that were written.
    numbers: HashMap<SocketAddr, (u32, BackendEntry)>,
}

/// What the kernel holds, and what is free.
pub struct Planner {
    held: HashMap<PortId, Held>,
    frontends: Frontends,
    ids: Numbers,
    runs: Runs,
    backends: HashMap<IpFamily, Numbers>,
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
            // Id 0 is "no Service": marked VIPs have it.
            ids: Numbers::new(1, capacity.services),
            runs: Runs::new(capacity.slots),
            backends,
        }
    }

    /// The Service ports that the kernel holds.
    pub fn ports(&self) -> impl Iterator<Item = &PortId> {
        self.held.keys()
    }

    /// Plans the change of one Service port to `wanted`; `None` removes it. `now` orders the reuse of
    /// what becomes free.
    pub fn plan(
        &mut self,
        now: Instant,
        port: &PortId,
        wanted: Option<&Port>,
        refusals: &mut Vec<Refusal>,
    ) -> Vec<Op> {
        self.reclaim(now);
        let mut ops = Vec::new();
        match wanted {
            Some(wanted) => self.put(now, port, wanted, &mut ops, refusals),
            None => self.remove(now, port, &mut ops, refusals),
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

    fn put(
        &mut self,
        now: Instant,
        port: &PortId,
        wanted: &Port,
        ops: &mut Vec<Op>,
        refusals: &mut Vec<Refusal>,
    ) {
        if self.held.get(port).is_some_and(|held| held.wanted == *wanted) {
            return;
        }
        let mut held = match self.held.remove(port) {
            Some(held) => held,
            None => match self.admit(port, ops) {
                Ok(held) => held,
                Err(refusal) => return refusals.push(*refusal),
            },
        };
        let result = self.put_backends(now, port, &mut held, wanted, ops);
        self.held.insert(port.clone(), held);
        match result {
            Ok(()) => {
                self.put_frontends(port, wanted, ops, refusals);
                self.withdraw(now, port, wanted, ops);
            }
            Err(refusal) => refusals.push(*refusal),
        }
    }

    /// A new Service port: a number and a name.
    fn admit(&mut self, port: &PortId, ops: &mut Vec<Op>) -> Result<Held, Box<Refusal>> {
        let full = || Box::new(Refusal::Full { port: port.clone(), table: "services" });
        let id = self.ids.take().ok_or_else(full)?;
        ops.push(Op::Name { id, port: port.clone() });
        Ok(Held { id, wanted: Port::default(), range: Range::default(), numbers: HashMap::new() })
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
        let usable = || wanted.backends.iter().filter(|b| b.usable);
        let before = usable_addresses(&held.wanted);
        let slots_change = !before.eq(usable().map(|b| b.address))
            || usable().any(|b| !held.numbers.contains_key(&b.address));
        let count = u32::try_from(usable().count()).map_err(|_| full("slots"))?;
        let range = if slots_change {
            self.runs.take(count).ok_or_else(|| full("slots"))?
        } else {
            held.range
        };
        for backend in &wanted.backends {
            let (number, generation) = match held.numbers.get(&backend.address) {
                Some((number, entry)) => (*number, entry.generation),
                None => numbers.take_with_generation().expect("enough are free"),
            };
            let entry = BackendEntry {
                address: backend.address,
                generation,
                serving: backend.serving,
                local: backend.local,
                service: held.id,
            };
            if held.numbers.insert(backend.address, (number, entry)) != Some((number, entry)) {
                ops.push(Op::Backend { family: port.family, number, backend: entry });
            }
        }
        if slots_change {
            for (index, backend) in (range.first..).zip(usable()) {
                ops.push(Op::Slot { index, number: held.numbers[&backend.address].0 });
            }
            self.runs.retire(now + GRACE, held.range);
            held.range = range;
            let own = held.wanted.frontends.iter().filter(|f| self.frontends.leads(**f, port));
            ops.extend(own.map(|frontend| Op::Lead { frontend: *frontend, id: held.id, range }));
        }
        Ok(())
    }

    /// Claims new frontends and gives up old ones.
    fn put_frontends(
        &mut self,
        port: &PortId,
        wanted: &Port,
        ops: &mut Vec<Op>,
        refusals: &mut Vec<Refusal>,
    ) {
        let had =
            std::mem::take(&mut self.held.get_mut(port).expect("it is held").wanted.frontends);
        for frontend in had.iter().filter(|frontend| !wanted.frontends.contains(frontend)) {
            self.frontends.release(*frontend, port);
            self.settle(*frontend, ops);
        }
        for frontend in &wanted.frontends {
            self.frontends.claim(*frontend, port, &wanted.created);
            self.settle(*frontend, ops);
            if let Some(holder) = self.frontends.winner(*frontend).filter(|winner| *winner != port)
            {
                refusals.push(Refusal::Taken {
                    port: port.clone(),
                    frontend: *frontend,
                    holder: holder.clone(),
                });
            }
        }
    }

    /// Leads a frontend to the Service port whose claim counts.
    fn settle(&mut self, frontend: Frontend, ops: &mut Vec<Op>) {
        let held = &self.held;
        let place = |port: &PortId| (held[port].id, held[port].range);
        self.frontends.settle(frontend, place, ops);
    }

    /// After the switch: backends that are gone stop serving, and their numbers become free.
    fn withdraw(&mut self, now: Instant, port: &PortId, wanted: &Port, ops: &mut Vec<Op>) {
        let held = self.held.get_mut(port).expect("it is held");
        let numbers = self.backends.get_mut(&port.family).expect("both families are there");
        let staying: BTreeSet<SocketAddr> = wanted.backends.iter().map(|b| b.address).collect();
        let mut gone: Vec<SocketAddr> =
            held.numbers.keys().filter(|address| !staying.contains(address)).copied().collect();
        gone.sort_unstable();
        for address in gone {
            let (number, entry) = held.numbers.remove(&address).expect("just found");
            let backend = BackendEntry { serving: false, ..entry };
            ops.push(Op::Backend { family: port.family, number, backend });
            numbers.retire(now + GRACE, number);
        }
        held.wanted = wanted.clone();
    }

    fn remove(
        &mut self,
        now: Instant,
        port: &PortId,
        ops: &mut Vec<Op>,
        refusals: &mut Vec<Refusal>,
    ) {
        if !self.held.contains_key(port) {
            return;
        }
        let nothing = Port::default();
        self.put_frontends(port, &nothing, ops, refusals);
        self.withdraw(now, port, &nothing, ops);
        let held = self.held.remove(port).expect("it is held");
        self.runs.retire(now + GRACE, held.range);
        ops.push(Op::Unname { id: held.id });
        self.ids.retire(now + GRACE, held.id);
    }
}

fn usable_addresses(port: &Port) -> impl Iterator<Item = SocketAddr> {
    port.backends.iter().filter(|backend| backend.usable).map(|backend| backend.address)
}
