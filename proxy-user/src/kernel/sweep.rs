//! Removes flows that have ended. The datapath does so when a packet meets one; this is for those that
//! no packet meets any more. The agent being away harms nothing but memory.

use std::path::Path;

use anyhow::{Context, Result};
use aya::maps::{HashMap, Map, MapData};
use proxy_common::tables::{FlowKey, FlowValue};
use proxy_common::{Family, V4, V6};

use super::read::now;
use super::sys::for_each;

/// What a sweep found.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Swept {
    /// Records in the tables of answered flows, two per flow.
    pub records: usize,
    /// Records removed.
    pub removed: usize,
}

/// Removes the records of flows of which both directions have been idle for longer than they may.
pub fn sweep(maps: &Path) -> Result<Swept> {
    let (v4, v6) = (sweep_family::<V4>(maps)?, sweep_family::<V6>(maps)?);
    Ok(Swept { records: v4.records + v6.records, removed: v4.removed + v6.removed })
}

fn sweep_family<F: Family>(maps: &Path) -> Result<Swept> {
    let path = maps.join(super::name_of::<F>("flows"));
    let map = MapData::from_pin(&path)?;
    let mut swept = Swept::default();
    let mut candidates: Vec<(FlowKey<F>, FlowKey<F>)> = Vec::new();
    let now = now();
    for_each(map.fd(), |key: &FlowKey<F>, value: &FlowValue<F>| {
        swept.records += 1;
        if value.expired(now) {
            candidates.push((*key, value.other));
        }
    })
    .with_context(|| format!("cannot read {}", path.display()))?;
    let mut flows = HashMap::<_, FlowKey<F>, FlowValue<F>>::try_from(Map::HashMap(map))?;
    for (key, other) in candidates {
        let alive = flows.get(&other, 0).is_ok_and(|other| !other.expired(now));
        if !alive && flows.remove(&key).is_ok() {
            swept.removed += 1;
        }
    }
    Ok(swept)
}
