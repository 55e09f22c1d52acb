//! The running agent: what is heard becomes writes, at once, and links are attached as they come.

mod attach;
mod flows;
mod vips;

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ipnet::IpNet;
use proxy_common::Outcome;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior};

use crate::agent::Agent;
use crate::events::Events;
use crate::exits::Exits;
use crate::health::{Failure, HealthChecks};
use crate::http::Status;
use crate::kernel::{Datapath, Granted, Swept};
use crate::links::{self, Change};
use crate::memory;
use crate::plan::{Op, Use};
use crate::retries::Retries;
use crate::routes::{Resolver, Routes};
use crate::watch::Update;

/// How often the flow tables are swept, and what did not fit is tried again.
const SWEEP: Duration = Duration::from_secs(30);
/// How often the flow tables are swept when they are nearly full.
const HASTE: Duration = Duration::from_secs(3);
/// How often it is looked whether something is to be done before its time.
const PULSE: Duration = Duration::from_secs(1);
/// How long it takes after a refused write until the maps are read back, at first: longer than anything in
/// them stays out of use.
const FIRST_WAIT: Duration = Duration::from_secs(2);
/// The same after many in a row.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How often what did not fit is tried again with the next pulses: what was given up for it becomes free.
const TRIES: u32 = 3;

/// Until a moment, or for ever.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// Ticks from one period on.
fn interval_at(period: Duration) -> Interval {
    tokio::time::interval_at(tokio::time::Instant::now() + period, period)
}

/// What an agent is made of.
pub struct Parts {
    /// From objects to writes.
    pub agent: Agent,
    /// The kernel's side.
    pub datapath: Datapath,
    /// What is told over HTTP.
    pub status: Arc<Status>,
    /// The ways to backends.
    pub routes: Resolver,
    /// What load balancers ask.
    pub checks: HealthChecks,
    /// What objects' owners are told.
    pub events: Events,
    /// The node's name.
    pub name: String,
    /// Where pods go without being masqueraded.
    pub except: BTreeSet<IpNet>,
    /// The `ClusterIPs` that there are.
    pub vips: watch::Sender<BTreeSet<IpAddr>>,
}

/// The agent with its datapath.
pub struct Node {
    agent: Agent,
    datapath: Datapath,
    status: Arc<Status>,
    routes: Resolver,
    checks: HealthChecks,
    events: Events,
    name: String,
    except: BTreeSet<IpNet>,
    vips: watch::Sender<BTreeSet<IpAddr>>,
    /// By which addresses is masqueraded, where that is to be written.
    exits: Option<Exits>,
    /// Links that could not be attached to, or not yet.
    retries: Retries,
    /// Whether all links that were there have been told of: others are new.
    is_listed: bool,
    /// The sweep that runs, on a thread of its own.
    sweeping: JoinSet<Result<Swept>>,
    /// Short cuts that are looked at, on a thread of its own.
    granting: JoinSet<Result<Granted>>,
    /// Sockets that are looked for whose backends serve no more, each time on a thread of its own.
    ending: JoinSet<Result<usize>>,
    /// How often live flows found no room, at the last pulse.
    unplaced: u64,
    /// What was said of tables and ports, so that it is said once.
    said: BTreeSet<String>,
    /// When the maps are read back, after the kernel has refused a write.
    read_back: Option<Instant>,
    /// How long that takes the next time.
    wait: Duration,
    /// Whether backends may have another way in the maps than the one that leads there now.
    ways_are_old: bool,
    /// The planner's time: it stands still from a plan until that is written, so that what was given up is out
    /// of use for long enough after its last reader.
    clock: Instant,
    /// Since when it goes on.
    written: Instant,
    /// How often what did not fit is still tried again soon.
    tries: u32,
}

impl Node {
    /// An agent that has heard nothing yet.
    pub fn new(parts: Parts) -> Self {
        let Parts { agent, datapath, status, routes, checks, events, name, except, vips } = parts;
        Self {
            agent,
            datapath,
            status,
            routes,
            checks,
            events,
            name,
            except,
            vips,
            exits: None,
            retries: Retries::default(),
            is_listed: false,
            sweeping: JoinSet::new(),
            granting: JoinSet::new(),
            ending: JoinSet::new(),
            unplaced: 0,
            said: BTreeSet::new(),
            read_back: None,
            wait: FIRST_WAIT,
            ways_are_old: false,
            clock: Instant::now(),
            written: Instant::now(),
            tries: 0,
        }
    }

    /// Carries what is heard into the kernel: at once, and all that has queued up meanwhile in one go.
    pub async fn serve(
        mut self,
        mut updates: mpsc::Receiver<Update>,
        mut links: mpsc::Receiver<Change>,
    ) {
        let (mut sweeps, mut pulses) = (interval_at(SWEEP), interval_at(PULSE));
        sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        pulses.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some(update) = updates.recv() => {
                    self.agent.hear(update);
                    while let Ok(update) = updates.try_recv() {
                        self.agent.hear(update);
                    }
                    self.sync().await;
                }
                Some(change) = links.recv() => {
                    // To attach takes the kernel tens of milliseconds: Services do not wait for all links that have come.
                    let mut is_last = matches!(change, Change::Came { .. });
                    let mut moved = self.take_in(change);
                    while !is_last && let Ok(change) = links.try_recv() {
                        is_last = matches!(change, Change::Came { .. });
                        moved.extend(self.take_in(change));
                    }
                    self.routes.refresh(&moved);
                    self.sync().await;
                }
                Some(swept) = self.sweeping.join_next() => {
                    if self.swept(swept.context("the sweep").flatten()) {
                        sweeps.reset_after(HASTE);
                    }
                }
                Some(granted) = self.granting.join_next() => {
                    self.granted(granted.context("the short cuts").flatten());
                }
                Some(ended) = self.ending.join_next() => {
                    self.ended(ended.context("the sockets of backends that are gone").flatten());
                }
                routes = self.routes.changed() => self.reroute(&routes),
                () = until(self.retries.next()) => self.attach_again(),
                _ = pulses.tick() => self.pulse().await,
                _ = sweeps.tick() => {
                    self.sweep();
                    self.reattach();
                    let backends = self.agent.remote_backends();
                    self.routes.keep_only(&backends);
                    self.datapath.keep_routes(&backends);
                    self.agent.retry();
                    self.sync().await;
                }
                else => return,
            }
        }
    }

    /// What may be to be done before its time.
    async fn pulse(&mut self) {
        self.serve_checks();
        self.note_caught();
        self.grant();
        if self.is_room_wanted() {
            self.sweep();
        }
        if self.read_back.is_some_and(|when| when <= Instant::now()) {
            self.recover().await;
        } else if self.tries > 0 {
            self.tries -= 1;
            self.agent.retry();
            self.sync().await;
        } else if !self.agent.is_settled() {
            self.sync().await;
        }
        self.watch_tables();
        self.status.beats(self.read_back.is_none());
    }

    /// Writes what follows from all that was heard. Not after a refused write, before it is known what the
    /// maps hold.
    async fn sync(&mut self) {
        if self.read_back.is_some() {
            // That needs no map.
            if self.status.is_ready() {
                self.status.synced(self.agent.services(), self.agent.is_eligible());
            }
            return;
        }
        let was_ready = self.status.is_ready();
        let becomes_ready = !was_ready && self.agent.is_ready();
        let mut is_first = true;
        while is_first || self.agent.is_filling() {
            if !self.carry_on(becomes_ready && is_first).await {
                return;
            }
            is_first = false;
        }
        if self.agent.has_new_refusals() {
            self.tries = TRIES;
        }
        self.agent.take_notices().into_iter().for_each(|notice| self.events.tell(notice));
        if self.agent.is_ready() {
            // Not before the node's addresses are marked: answers of masqueraded pods need that.
            self.set_exits();
            if let Some((checks, at)) = self.agent.changed_health_checks() {
                self.checks.set(&checks, &at).await;
                self.serve_checks();
            }
            self.status.synced(self.agent.services(), self.agent.is_eligible());
            self.status.beats(true);
            if !was_ready {
                tracing::info!("in step with the cluster: {} Services", self.agent.services());
                memory::trim();
            }
        }
    }

    /// Plans, and writes what is planned. False if a write was refused.
    async fn carry_on(&mut self, becomes_ready: bool) -> bool {
        let started = Instant::now();
        self.clock += self.written.elapsed();
        let mut ops = self.agent.plan(self.clock);
        if ops.is_empty() && !becomes_ready && !self.ways_are_old {
            self.written = Instant::now();
            return true;
        }
        let written = ops.iter().filter_map(|op| match op {
            Op::Backend { backend, .. } if backend.is_remote() => Some(backend.address.ip()),
            _ => None,
        });
        let written: HashSet<IpAddr> = written.collect();
        // Those that an earlier agent has written too, of which a plan does not speak.
        let taken_over = becomes_ready.then(|| self.agent.remote_backends());
        let wanted = written.iter().copied().chain(taken_over.into_iter().flatten());
        let learnt = self.routes.learn(wanted).await;
        let mut changed = self.datapath.set_routes(&learnt);
        changed.retain(|address| !written.contains(address));
        if self.ways_are_old {
            ops.extend(self.agent.rewrite(|_| true));
        } else if !changed.is_empty() {
            ops.extend(self.agent.rewrite(|address| changed.contains(&address)));
        }
        if !self.write(&ops) {
            return false;
        }
        self.ways_are_old = false;
        self.written = Instant::now();
        tracing::debug!("{} writes in {:?}", ops.len(), started.elapsed());
        true
    }

    /// Carries out writes. If the kernel refuses one, which may pass, what the maps hold is read back after
    /// a while, and the rest planned from there. False if so.
    fn write(&mut self, ops: &[Op]) -> bool {
        let Err(error) = self.datapath.apply(ops) else {
            self.wait = FIRST_WAIT;
            self.tell_vips(ops);
            self.end_abandoned(ops);
            return true;
        };
        self.postpone(&error.context("the kernel refused a write to its maps"));
        false
    }

    fn postpone(&mut self, error: &anyhow::Error) {
        tracing::warn!(
            "{error:#}; what they hold is read back in {:?}, and the rest written then. Until then \
             Services stay as they are",
            self.wait
        );
        self.status.refused();
        self.ways_are_old = true;
        self.written = Instant::now();
        self.read_back = Some(Instant::now() + self.wait);
        self.wait = (self.wait * 2).min(LONGEST_WAIT);
    }

    /// Reads back what the maps hold, and goes on from there.
    async fn recover(&mut self) {
        self.read_back = None;
        match self.datapath.recover() {
            Ok(planner) => self.agent.start_over(planner),
            Err(error) => return self.postpone(&error.context("the maps can't be read back")),
        }
        // As long a wait again, or longer, if that is refused too.
        let wait = self.wait;
        let except = self.agent.except_from_masquerade(&self.except);
        if self.write(&except) {
            self.wait = wait;
            self.sync().await;
        }
        if self.read_back.is_none() {
            tracing::info!("the kernel takes writes again");
        }
    }

    /// Says by which addresses is masqueraded what leaves by each link, if that is new or was refused.
    fn set_exits(&mut self) {
        let Some(exits) = self.exits.take() else { return };
        let result = self.datapath.set_exits(&exits);
        let text = "flows may not be masqueraded, since the node's addresses can't be written; is tried again";
        self.say(result.is_err(), text.to_owned());
        if let Err(error) = result {
            tracing::debug!("{error:#}");
            self.exits = Some(exits);
        }
    }

    /// Takes in which ways lead to backends, where that was asked.
    fn reroute(&mut self, routes: &Routes) {
        let changed = self.datapath.set_routes(routes);
        if changed.is_empty() {
            return;
        }
        let ops = self.agent.rewrite(|address| changed.contains(&address));
        if self.read_back.is_some() {
            self.ways_are_old = true;
        } else if self.write(&ops) {
            tracing::info!("other ways lead to {} backend addresses", changed.len());
        }
    }

    /// Takes in a change of links or addresses. Says where other ways may lead to backends.
    fn take_in(&mut self, change: Change) -> Vec<IpNet> {
        match change {
            Change::Came { ifindex, name, role } => self.come(ifindex, &name, role),
            Change::Went { ifindex, name } => {
                self.retries.remove(ifindex);
                self.datapath.detach(ifindex);
                tracing::info!("detached from {name} ({ifindex})");
            }
            Change::Listed(links) => {
                self.is_listed = true;
                self.retries.keep_only(&links);
                self.datapath.detach_others(&links);
            }
            Change::Addresses(addresses) => {
                self.agent.set_addresses(addresses);
                return links::everywhere().into();
            }
            Change::Exits(exits) => self.exits = Some(exits),
            Change::Routes(ranges) => return ranges,
        }
        Vec::new()
    }

    /// Says something once, and again only after it was not so.
    fn say(&mut self, holds: bool, text: String) {
        if !holds {
            self.said.remove(&text);
        } else if !self.said.contains(&text) {
            tracing::warn!("{text}");
            self.said.insert(text);
        }
    }

    /// Whether live flows found no room since the last pulse.
    fn is_room_wanted(&mut self) -> bool {
        let count = self.datapath.count(Outcome::TableFull).unwrap_or(self.unplaced);
        std::mem::replace(&mut self.unplaced, count) < count
    }

    /// Says which tables of Services are nearly full, and passes on how full all are.
    fn watch_tables(&mut self) {
        let mut usage = self.agent.usage();
        usage.extend(self.datapath.usage());
        for Use { table, used, size } in &usage {
            let text = format!(
                "more than 80 % of the table {table} is in use: what is added above its {size} is refused. \
                 --table-size gives more room"
            );
            self.say(used * 5 > size * 4, text);
        }
        self.status.used(usage);
        self.datapath.watch_relays();
        self.status.relays(self.datapath.relays());
    }

    /// Starts the health checks that are not served yet, and says which can't be (KP-107).
    fn serve_checks(&mut self) {
        if !self.checks.is_missing_any() {
            return;
        }
        for Failure { service, address, error } in self.checks.serve() {
            tracing::warn!(
                "Service {service}: no health check at {address}: {error}; is tried again"
            );
            let note = format!(
                "node {} failed to start healthcheck \"{service}\" on port {}: {error}",
                self.name,
                address.port()
            );
            let (reason, action) = ("FailedToStartServiceHealthcheck", "Listen");
            self.events.tell(self.agent.warning(&service, reason, action, note));
        }
    }
}
