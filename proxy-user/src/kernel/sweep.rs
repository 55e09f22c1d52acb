//! Removes flows that have ended. The datapath does so when a packet meets one; this is for those that
//! no packet meets any more. The agent being away harms nothing but memory.
//!
//! On the way it counts each backend's flows anew, for least-conn: the datapath counts flows that open
//! and TCP's that end, but not those that fall silent.

use std::path::Path;

use anyhow::{Context, Result};
use aya::maps::{HashMap, Map, MapData};
use proxy_common::Family;
use proxy_common::tables::{FlowKey, FlowValue};

use super::read::now;
use super::sys::for_each;
use super::writer::{FamilyTables, Writer};

/// What a sweep found.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Swept {
    /// Records in the tables of answered flows, two per flow.
    pub records: usize,
    /// Records removed.
    pub removed: usize,
}

/// Removes the records of flows of which both directions have been idle for longer than they may.
pub fn sweep(maps: &Path, writer: &Writer) -> Result<Swept> {
    let v4 = sweep_family(maps, &writer.v4)?;
    let v6 = sweep_family(maps, &writer.v6)?;
    Ok(Swept { records: v4.records + v6.records, removed: v4.removed + v6.removed })
}

fn sweep_family<F: Family>(maps: &Path, tables: &FamilyTables<F>) -> Result<Swept> {
    let mut swept = Swept::default();
    let mut candidates: Vec<(FlowKey<F>, FlowKey<F>)> = Vec::new();
    let mut counts: std::collections::HashMap<u32, u32> = std::collections::HashMap::new();
    let now = now();
    // A number may have been given to another backend since.
    let is_same = |value: &FlowValue<F>| {
        value.backend < tables.backends.length()
            && tables.backends.get(value.backend).generation == value.generation
    };
    let mut look = |value: &FlowValue<F>| {
        if value.is_counted(now) && is_same(value) {
            *counts.entry(value.backend).or_default() += 1;
        }
    };
    let flows = read(maps, "flows", |key: &FlowKey<F>, value: &FlowValue<F>| {
        swept.records += 1;
        look(value);
        if value.expired(now) {
            candidates.push((*key, value.other));
        }
    })?;
    read(maps, "embryos", |_: &FlowKey<F>, value| look(value))?;
    let loads = &tables.loads;
    for backend in 0..loads.length() {
        let count = counts.get(&backend).copied().unwrap_or_default();
        if loads.get(backend) != count {
            loads.set(backend, count);
        }
    }
    let mut flows = HashMap::<_, FlowKey<F>, FlowValue<F>>::try_from(Map::HashMap(flows))?;
    for (key, other) in candidates {
        let alive = flows.get(&other, 0).is_ok_and(|other| !other.expired(now));
        if !alive && flows.remove(&key).is_ok() {
            swept.removed += 1;
        }
    }
    Ok(swept)
}

fn read<F: Family>(
    maps: &Path,
    table: &str,
    each: impl FnMut(&FlowKey<F>, &FlowValue<F>),
) -> Result<MapData> {
    let path = maps.join(super::name_of::<F>(table));
    let map = MapData::from_pin(&path)?;
    for_each(map.fd(), each).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(map)
}
