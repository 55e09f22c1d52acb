//! Removes live flows that have ended. The datapath does so when a packet meets one; this is for those that
//! no packet meets any more. The agent being away harms nothing but memory.
//!
//! On the way it counts the flows of each backend that least-conn chooses from: the datapath counts flows
//! that open and TCP's that end, but not those that fall silent.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::{Context, Result};
use aya::maps::{HashMap as HashTable, Map, MapData};
use bytemuck::Pod;
use proxy_common::Family;
use proxy_common::settings::Lifetimes;
use proxy_common::tables::{
    AffinityKey, AffinityValue, EmbryoValue, Facts, FlowKey, FlowValue, FragmentKey, FragmentValue,
    Origin, PeerKey, PeerValue, State,
};
use proxy_common::{V4, V6};

use super::counts::Counts;
use super::mapped::Mapped;
use super::name_of;
use super::read::{self, now};
use super::silent::Silent;
use super::sys::{self, for_each};
use super::writer::open_mapped;
use crate::plan::Use;

/// How many records are looked at again, and removed, before more are read.
const BATCH: usize = 1024;

/// What a sweep found.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Swept {
    /// Records of live flows that are left, two per flow, of each family.
    pub records: [usize; 2],
    /// Records removed.
    pub removed: usize,
    /// How full the tables are that the datapath fills.
    pub tables: Vec<Use>,
}

/// The same of one family.
#[derive(Default)]
struct Found {
    left: usize,
    removed: usize,
}

/// Backends whose flows are counted, with their generations, of each family.
pub type Counted = [HashMap<u32, u16>; 2];

/// A sweep to come. It needs nothing of the agent, and so can run on a thread of its own.
pub struct Sweep {
    /// The folder of the pinned maps.
    pub maps: PathBuf,
    /// Whose flows are counted.
    pub counted: Counted,
    /// When the last one began, in ticks.
    pub since: u32,
}

impl Sweep {
    /// Removes the records of flows of which both directions have been idle for longer than they may.
    ///
    /// # Errors
    /// If a table can't be read.
    pub fn run(&self) -> Result<Swept> {
        let lifetimes = read::config(&self.maps)?.lifetimes;
        let v4 = self.family::<V4>(lifetimes, &self.counted[0])?;
        let v6 = self.family::<V6>(lifetimes, &self.counted[1])?;
        let mut tables = self.tables::<V4>(v4.left)?;
        tables.extend(self.tables::<V6>(v6.left)?);
        Ok(Swept { records: [v4.left, v6.left], removed: v4.removed + v6.removed, tables })
    }

    /// How full one family's tables are. Those that evict the oldest are full after some time, which is no fault.
    fn tables<F: Family>(&self, flows: usize) -> Result<Vec<Use>> {
        let path = self.maps.join(name_of::<F>("flows"));
        let size = MapData::from_pin(path)?.info()?.max_entries() as usize;
        Ok(vec![
            Use { table: name_of::<F>("flows"), used: flows, size },
            self.count::<FlowKey<F>, EmbryoValue<F>>(name_of::<F>("embryos"))?,
            self.count::<FragmentKey<F>, FragmentValue>(name_of::<F>("fragments"))?,
            self.count::<PeerKey<F>, PeerValue<F>>(name_of::<F>("peers"))?,
            self.count::<AffinityKey<F>, AffinityValue>(name_of::<F>("affinity"))?,
        ])
    }

    fn count<K: Pod, V: Pod>(&self, table: String) -> Result<Use> {
        let map = MapData::from_pin(self.maps.join(&table))?;
        let mut used = 0;
        for_each(map.fd(), |_: &K, _: &V| used += 1)
            .with_context(|| format!("cannot count {table}"))?;
        Ok(Use { table, used, size: map.info()?.max_entries() as usize })
    }

    fn family<F: Family>(
        &self,
        lifetimes: Lifetimes,
        counted: &HashMap<u32, u16>,
    ) -> Result<Found> {
        let path = self.maps.join(name_of::<F>("flows"));
        let mut table = Table::<F>::open(MapData::from_pin(&path)?, lifetimes)?;
        let mut loads = Loads::new(counted);
        let mut swept = Found::default();
        let mut idle = Vec::with_capacity(BATCH);
        let mut silent = Silent::new(table.now, self.since);
        let file = table.file.try_clone()?;
        for_each(&file, |key: &FlowKey<F>, value: &FlowValue<F>| {
            swept.left += 1;
            silent.note(key, value);
            if !table.is_idle(key, value.facts()) {
                loads.count(value.facts());
            } else if value.facts().origin.is(Origin::REPLY) {
                // The client's record goes with it; one without its reply is found below.
            } else {
                idle.push(*key);
            }
            if idle.len() == BATCH {
                idle.drain(..).for_each(|key| swept.removed += table.remove_if_idle(&key));
            }
        })
        .with_context(|| format!("cannot read {}", path.display()))?;
        idle.drain(..).for_each(|key| swept.removed += table.remove_if_idle(&key));
        swept.removed += table.remove_halves()?;
        silent.keep();
        std::mem::take(&mut table.counts).hand_over::<F>(&self.maps)?;
        // Some were removed before they were seen.
        swept.left = swept.left.saturating_sub(swept.removed);
        if !counted.is_empty() {
            self.count_others::<F>(&table, &mut loads)?;
            loads.write(&open_mapped(&self.maps, &name_of::<F>("loads"))?)?;
        }
        Ok(swept)
    }

    /// Counts flows that are not live.
    fn count_others<F: Family>(&self, table: &Table<F>, loads: &mut Loads<'_>) -> Result<()> {
        let path = self.maps.join(name_of::<F>("embryos"));
        for_each(MapData::from_pin(&path)?.fd(), |key: &FlowKey<F>, value: &EmbryoValue<F>| {
            let facts = value.facts();
            // A live flow's shadow is in no state that counts for long.
            if facts.state != State::Closed && !table.is_idle(key, facts) && !table.has(key) {
                loads.count(facts);
            }
        })
        .with_context(|| format!("cannot read {}", path.display()))
    }
}

/// A family's table of live flows.
struct Table<F: Family> {
    file: std::os::fd::OwnedFd,
    flows: HashTable<MapData, FlowKey<F>, FlowValue<F>>,
    lifetimes: Lifetimes,
    now: u32,
    counts: Counts,
}

impl<F: Family> Table<F> {
    fn open(map: MapData, lifetimes: Lifetimes) -> Result<Self> {
        let file = map.fd().as_fd().try_clone_to_owned()?;
        let flows = HashTable::try_from(Map::HashMap(map))?;
        Ok(Self { file, flows, lifetimes, now: now(), counts: Counts::default() })
    }

    fn is_idle(&self, key: &FlowKey<F>, facts: Facts) -> bool {
        facts.expired(*self.lifetimes.of(key.proto, facts.state), self.now)
    }

    fn has(&self, key: &FlowKey<F>) -> bool {
        self.flows.get(key, 0).is_ok()
    }

    /// Looks again whether both directions of a flow are idle, and removes both. How many went.
    fn remove_if_idle(&mut self, key: &FlowKey<F>) -> usize {
        let Ok(value) = self.flows.get(key, 0) else { return 0 };
        let other = value.other_by_stack(key);
        let reply =
            self.flows.get(&other, 0).ok().filter(|reply| reply.other_by_stack(&other) == *key);
        let idle = |key: &FlowKey<F>, value: &FlowValue<F>| self.is_idle(key, value.facts());
        if !idle(key, &value) || reply.is_some_and(|reply| !idle(&other, &reply)) {
            return 0;
        }
        let reply = reply.map_or(0, |reply| self.remove(&other, &reply));
        reply + self.remove(key, &value)
    }

    /// Removes a record, unless it has changed since it was looked at: then it stays, or comes back.
    fn remove(&mut self, key: &FlowKey<F>, decided: &FlowValue<F>) -> usize {
        match sys::take::<_, FlowValue<F>>(&self.file, key) {
            Ok(Some(taken)) if taken == *decided => self.removed(decided),
            Ok(Some(taken)) => {
                const NOEXIST: u64 = 1;
                let _ = self.flows.insert(key, taken, NOEXIST);
                0
            }
            Ok(None) => 0,
            // The kernel can't do both at once.
            Err(_) => {
                let is_same = self.flows.get(key, 0).is_ok_and(|value| value == *decided);
                if is_same && self.flows.remove(key).is_ok() { self.removed(decided) } else { 0 }
            }
        }
    }

    /// One record less; what it has counted is kept.
    fn removed(&mut self, record: &FlowValue<F>) -> usize {
        self.counts.take(record);
        1
    }

    /// Removes idle records of backends' packets whose client's record is not there.
    fn remove_halves(&mut self) -> Result<usize> {
        let mut halves = Vec::new();
        for_each(&self.file, |key: &FlowKey<F>, value: &FlowValue<F>| {
            let facts = value.facts();
            if facts.origin.is(Origin::REPLY) && self.is_idle(key, facts) {
                halves.push((*key, *value));
            }
        })?;
        let alone = halves.into_iter().filter(|(key, value)| !self.has(&value.other_by_stack(key)));
        let alone: Vec<_> = alone.collect();
        Ok(alone.into_iter().map(|(key, value)| self.remove(&key, &value)).sum())
    }
}

/// How many flows each backend has whose flows are counted.
struct Loads<'a> {
    counted: &'a HashMap<u32, u16>,
    flows: HashMap<u32, u32>,
}

impl<'a> Loads<'a> {
    fn new(counted: &'a HashMap<u32, u16>) -> Self {
        Self { counted, flows: HashMap::new() }
    }

    fn count(&mut self, facts: Facts) {
        let Origin { backend, generation, .. } = facts.origin;
        if !facts.origin.is(Origin::REPLY) && self.counted.get(&backend) == Some(&generation) {
            *self.flows.entry(backend).or_default() += 1;
        }
    }

    fn write(&self, loads: &Mapped<u32>) -> std::io::Result<()> {
        let flows = |backend| self.flows.get(backend).copied().unwrap_or_default();
        self.counted.keys().try_for_each(|backend| loads.set(*backend, flows(backend)))
    }
}
