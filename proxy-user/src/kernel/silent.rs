//! Connections with short cuts that have fallen silent. Of what came before that, the kernel's own table of connections has seen
//! little, perhaps no acknowledgement of what it saw last; then it would forget a connection in minutes that it keeps for
//! days otherwise, and take what comes next for the beginning of another one, to which other rules apply.

use std::net::SocketAddr;

use proxy_common::tables::{FlowKey, FlowValue, Origin, expired};
use proxy_common::{Family, proto};

use super::conntrack::{self, Conntrack};

/// How many ticks a connection must be silent.
const SILENCE: u32 = 2;

/// Those that a sweep has met, as the kernel knows them.
pub struct Silent {
    now: u32,
    since: u32,
    found: Vec<[SocketAddr; 2]>,
}

impl Silent {
    /// None yet, of those that have fallen silent since a tick.
    pub const fn new(now: u32, since: u32) -> Self {
        Self { now, since, found: Vec::new() }
    }

    /// Takes a record in, if it is its client's and of such a connection.
    pub fn note<F: Family>(&mut self, key: &FlowKey<F>, value: &FlowValue<F>) {
        let facts = value.facts();
        let is_clients = facts.is_cut() && !facts.origin.is(Origin::REPLY);
        // Those of before were told of by the last sweep.
        let is_new = !expired(value.seen, 2 * SILENCE, self.since);
        if key.proto == proto::TCP && is_clients && facts.expired(SILENCE, self.now) && is_new {
            let backend = value.other_by_stack(key);
            let client = SocketAddr::new(key.src.into(), key.sport.number());
            self.found.push([client, SocketAddr::new(backend.src.into(), backend.sport.number())]);
        }
    }

    /// Has them kept as long as any that is idle.
    pub fn keep(self) {
        if self.found.is_empty() || !conntrack::is_in_use() {
            return;
        }
        let count = self.found.len();
        let keep = |conntrack: Conntrack| {
            let mut kept = self.found.into_iter().map(|[from, to]| conntrack.be_liberal(from, to));
            kept.try_for_each(|kept| kept.map(|_| ()))
        };
        match Conntrack::open().and_then(keep) {
            Ok(()) => tracing::debug!("{count} silent connections are kept"),
            Err(error) => {
                tracing::warn!("the kernel may forget connections that are idle: {error}");
            }
        }
    }
}
