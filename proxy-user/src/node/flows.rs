//! What is done for flows now and then: ended ones are swept away, short cuts are granted, and sockets whose backends are gone are
//! ended.

use anyhow::Result;

use super::Node;
use crate::kernel::{Granted, Swept};
use crate::memory;
use crate::plan::Op;

impl Node {
    /// Ends the sockets of backends that serve no more.
    pub(super) fn end_abandoned(&mut self, ops: &[Op]) {
        if let Some(abandoned) = self.datapath.abandoned(ops) {
            self.ending.spawn_blocking(move || abandoned.run());
        }
    }

    pub(super) fn ended(&mut self, ended: Result<usize>) {
        let text = "UDP sockets of the node that are connected to backends which are gone have to connect anew by themselves";
        self.say(ended.is_err(), text.to_owned());
        match ended {
            Ok(0) => {}
            Ok(ended) => tracing::info!(
                "{ended} UDP sockets of the node must connect anew: their backends are gone"
            ),
            Err(error) => tracing::debug!("{error:#}"),
        }
    }

    /// Sweeps the flow tables, if that is not being done.
    pub(super) fn sweep(&mut self) {
        if self.sweeping.is_empty() {
            let sweep = self.datapath.sweep();
            self.sweeping.spawn_blocking(move || sweep.run());
        }
    }

    /// Looks at the short cuts that the datapath asks for, if that is not being done.
    pub(super) fn grant(&mut self) {
        if self.granting.is_empty()
            && let Some(granting) = self.datapath.wishes()
        {
            self.granting.spawn_blocking(move || granting.run());
        }
    }

    pub(super) fn granted(&mut self, granted: Result<Granted>) {
        let granted = granted.and_then(|Granted { keys, error }| {
            let count = keys.count();
            self.datapath.keep_granted(keys);
            error.map_or(Ok(count), Err)
        });
        let text = "flows from outside go by the host stack, and take no short cut: --short-cut=off asks for none";
        self.say(granted.is_err(), text.to_owned());
        match granted {
            Ok(granted) => tracing::debug!("{granted} flows got a short cut"),
            Err(error) => tracing::debug!("no short cut: {error:#}"),
        }
    }

    /// Takes in what a sweep has found. True if the tables are nearly full.
    pub(super) fn swept(&mut self, swept: Result<Swept>) -> bool {
        let swept = match swept {
            Ok(swept) => swept,
            Err(error) => {
                tracing::warn!("cannot sweep the flow tables: {error:#}");
                return false;
            }
        };
        let records = swept.records;
        self.status.swept(swept);
        memory::trim();
        let room = self.datapath.max_flows();
        let is_nearly_full = records.iter().any(|records| records * 5 > room * 4);
        let text = format!(
            "more than 80 % of the {room} records for live flows are in use; further ones are served \
             from a table where flows can be evicted. --max-flows gives them more room"
        );
        self.say(is_nearly_full, text);
        for ((service, backend), count) in self.datapath.take_exhausted() {
            let port = self.agent.name_of(service).unwrap_or_default();
            let text = format!(
                "{port}: no source port was free for flows to {backend}, which has too many from this \
                 node; --masquerade-ports may give more"
            );
            tracing::debug!("{count} flows to {backend} got no source port");
            self.say(true, text);
        }
        is_nearly_full
    }
}
