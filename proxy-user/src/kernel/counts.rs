//! What records of flows have counted that a sweep removes: handed over as a story of the datapath would have.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use proxy_common::tables::{Backend, FlowValue, Traffic};
use proxy_common::{Family, Outcome};

use super::name_of;
use super::read::open_swept;
use super::writer::open_mapped;

/// Packets and bytes that nobody else knows of.
#[derive(Default)]
pub struct Counts {
    outcomes: HashMap<Outcome, u64>,
    /// By the backend's number and generation.
    traffic: HashMap<(u32, u16), [u64; 2]>,
}

impl Counts {
    /// Takes in what a record has counted.
    pub fn take<F: Family>(&mut self, record: &FlowValue<F>) {
        if record.packets == 0 {
            return;
        }
        let origin = record.facts().plain;
        *self.outcomes.entry(origin.outcome()).or_default() += u64::from(record.packets);
        let traffic = self.traffic.entry((origin.backend, origin.generation)).or_default();
        traffic[0] += u64::from(record.packets);
        traffic[1] += u64::from(record.bytes);
    }

    /// Adds all of it to the maps. What went to a backend whose number is another's by now belongs to no
    /// Service port any more.
    ///
    /// # Errors
    /// If one of them can't be opened or written.
    pub fn hand_over<F: Family>(self, maps: &Path) -> Result<()> {
        if self.outcomes.is_empty() {
            return Ok(());
        }
        let mut swept = open_swept(maps)?;
        for (outcome, packets) in self.outcomes {
            let before = swept.get(&outcome.index(), 0)?;
            swept.set(outcome.index(), before + packets, 0).context("outcomes_swept")?;
        }
        let backends = open_mapped::<Backend<F>>(maps, &name_of::<F>("backends"))?;
        let ports = open_mapped::<Traffic>(maps, "traffic")?;
        for ((number, generation), [packets, bytes]) in self.traffic {
            if number >= backends.length() {
                continue;
            }
            let backend = backends.get(number)?;
            if backend.generation == generation && backend.service < ports.length() {
                ports.add(backend.service, 0, packets)?;
                ports.add(backend.service, 1, bytes)?;
            }
        }
        Ok(())
    }
}
