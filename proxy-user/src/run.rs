//! `portal run`: the wiring.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use aya_log::EbpfLogger;
use ipnet::IpNet;
use proxy_common::Outcome;
use proxy_common::tables::Algorithm;
use serde_json::Value;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::agent::Agent;
use crate::desired::node_ports::NodePortAddresses;
use crate::events::{Events, Notice};
use crate::health::{Failure, HealthChecks};
use crate::http::{self, Status};
use crate::kernel::{Datapath, Options};
use crate::model::{self, ObjectName};
use crate::netlink::{self, Change, Exits, Role, Rule};
use crate::plan::Op;
use crate::routes::Resolver;
use crate::watch::{self, Source, Update};

/// How often the flow tables are swept, and what did not fit is tried again.
const SWEEP: Duration = Duration::from_secs(30);
/// How often a health check that can't be served is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How many links may wait to be attached.
const LINK_QUEUE: usize = 1024;

/// What `portal run` was asked to do, resolved.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The node's name.
    pub node: String,
    /// What /configz tells.
    pub config: Value,
    /// How Services choose their backends that do not say.
    pub algorithm: Algorithm,
    /// Where objects come from.
    pub source: Source,
    /// The datapath.
    pub kernel: Options,
    /// What links are for.
    pub interfaces: Vec<Rule>,
    /// Which of the node's addresses take `NodePorts`.
    pub node_ports: NodePortAddresses,
    /// Where pods go without being masqueraded.
    pub masquerade_except: BTreeSet<IpNet>,
    /// Whether pods get the ports of the node that they ask for.
    pub host_ports: bool,
    /// Where to serve health.
    pub healthz: Option<SocketAddr>,
    /// Where to serve metrics.
    pub metrics: Option<SocketAddr>,
}

/// Runs the agent until it is told to end. The datapath stays.
///
/// # Errors
/// If it can't start; says what is missing and what to do.
pub async fn run(settings: Settings) -> Result<()> {
    let mut ends = signal(SignalKind::terminate())?;
    let mut interrupts = signal(SignalKind::interrupt())?;
    tokio::select! {
        result = follow(settings) => result,
        _ = ends.recv() => Ok(()),
        _ = interrupts.recv() => Ok(()),
    }
}

async fn follow(settings: Settings) -> Result<()> {
    let mut tasks = JoinSet::new();
    // First what may fail without a trace.
    let kinds = watch::kinds(settings.host_ports);
    let events = Events::start(&settings.source, &settings.node, &mut tasks).await?;
    let updates = watch::start(settings.source, &settings.node, kinds.clone(), &mut tasks).await?;
    let (mut datapath, planner) = Datapath::install(&settings.kernel)?;
    if settings.kernel.trace {
        tasks.spawn(log_packets(datapath.take_log()?));
    }
    let status = Arc::new(Status::new(settings.kernel.bpffs_root.clone(), settings.config));
    if let Some(address) = settings.healthz {
        tasks.spawn(http::serve(address, http::health_routes(Arc::clone(&status))));
    }
    if let Some(address) = settings.metrics {
        tasks.spawn(http::serve(address, http::metrics_routes(Arc::clone(&status))));
    }
    let own = model::Node {
        name: settings.node.clone(),
        algorithm: settings.algorithm,
        ..model::Node::default()
    };
    let mut agent = Agent::new(own, settings.node_ports, kinds, planner);
    datapath.apply(&agent.except_from_masquerade(&settings.masquerade_except))?;
    let (changes, links) = mpsc::channel(LINK_QUEUE);
    tasks.spawn(netlink::follow(settings.interfaces, changes));
    let routes = Resolver::new()?;
    let failed = HashMap::new();
    let checks = HealthChecks::default();
    let name = settings.node;
    tracing::info!("portal {} on node {name}", env!("CARGO_PKG_VERSION"));
    events.tell(starting(&name));
    let node = Node {
        agent,
        datapath,
        status,
        routes,
        checks,
        events,
        name,
        exits: None,
        failed,
        refused: HashMap::new(),
    };
    tokio::select! {
        result = node.serve(updates, links) => result,
        Some(ended) = tasks.join_next() => ended?.context("a part of the agent has ended"),
    }
}

/// As kube-proxy tells of itself (KP-151); a node's UID in Events is its name.
fn starting(node: &str) -> Notice {
    Notice {
        kind: "Node",
        name: ObjectName::new("", node),
        uid: node.to_owned(),
        warns: false,
        reason: "Starting",
        action: "StartPortal",
        note: String::new(),
    }
}

/// Passes on what the programs log, for ever.
async fn log_packets(log: EbpfLogger<&'static dyn log::Log>) -> Result<()> {
    // SAFETY: the log owns its descriptor, and is itself owned by what registers it.
    let mut log = unsafe { AsyncFd::register_with_interest(log, Interest::READABLE)? };
    loop {
        let mut ready = log.readable_mut().await?;
        ready.get_inner_mut().flush();
        ready.clear_ready();
    }
}

/// The agent with its datapath.
struct Node {
    agent: Agent,
    datapath: Datapath,
    status: Arc<Status>,
    routes: Resolver,
    checks: HealthChecks,
    events: Events,
    /// The node's name.
    name: String,
    /// By which addresses pods leave the cluster, where that is to be written.
    exits: Option<Exits>,
    /// Links that could not be attached to, to be tried again.
    failed: HashMap<u32, (String, Role)>,
    /// How often new flows were dropped for want of room, at the last sweep.
    refused: HashMap<Outcome, u64>,
}

impl Node {
    /// Carries what is heard into the kernel: at once, and all that has queued up meanwhile in one go.
    async fn serve(
        mut self,
        mut updates: mpsc::Receiver<Update>,
        mut links: mpsc::Receiver<Change>,
    ) -> Result<()> {
        let (mut sweeps, mut retries) = (interval(SWEEP), interval(RETRY));
        sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        retries.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some(update) = updates.recv() => {
                    self.agent.hear(update);
                    while let Ok(update) = updates.try_recv() {
                        self.agent.hear(update);
                    }
                    self.sync().await?;
                }
                Some(change) = links.recv() => {
                    let mut moved = self.take_in(change);
                    while let Ok(change) = links.try_recv() {
                        moved.extend(self.take_in(change));
                    }
                    self.reroute(&moved).await?;
                    self.sync().await?;
                }
                _ = retries.tick(), if self.checks.is_missing_any() => self.serve_checks(),
                _ = sweeps.tick() => {
                    self.sweep();
                    self.sync().await?;
                }
                else => return Ok(()),
            }
        }
    }

    async fn sync(&mut self) -> Result<()> {
        let was_ready = self.status.is_ready();
        let started = Instant::now();
        let mut ops = self.agent.plan(started);
        let becomes_ready = !was_ready && self.agent.is_ready();
        if !ops.is_empty() || becomes_ready {
            let written = ops.iter().filter_map(|op| match op {
                Op::Backend { backend, .. } if backend.is_remote() => Some(backend.address.ip()),
                _ => None,
            });
            // Those that an earlier agent has written too, of which a plan does not speak.
            let taken_over = becomes_ready.then(|| self.agent.remote_backends());
            let learnt = self.routes.learn(written.chain(taken_over.into_iter().flatten())).await;
            self.datapath.set_routes(&learnt);
            if becomes_ready {
                ops.extend(self.agent.rewrite(|address| learnt.contains_key(&address)));
            }
            self.datapath.apply(&ops).context("cannot write the kernel's maps")?;
            tracing::debug!("{} writes in {:?}", ops.len(), started.elapsed());
        }
        self.agent.take_notices().into_iter().for_each(|notice| self.events.tell(notice));
        if self.agent.is_ready() {
            // Not before the node's addresses are marked: answers of masqueraded pods need that.
            if let Some(Err(error)) = self.exits.take().map(|exits| self.datapath.set_exits(&exits))
            {
                tracing::warn!("pods may leave the cluster with their own addresses: {error:#}");
            }
            if let Some((checks, at)) = self.agent.changed_health_checks() {
                self.checks.set(&checks, &at).await;
                self.serve_checks();
            }
            self.status.synced(self.agent.services(), self.agent.is_eligible());
            if !was_ready {
                tracing::info!("in step with the cluster: {} Services", self.agent.services());
            }
        }
        Ok(())
    }

    /// Asks anew for the ways to backends in these ranges.
    async fn reroute(&mut self, moved: &[IpNet]) -> Result<()> {
        if moved.is_empty() {
            return Ok(());
        }
        let changed = self.routes.refresh(&self.agent.remote_backends(), moved).await;
        if !changed.is_empty() {
            self.datapath.set_routes(&changed);
            let ops = self.agent.rewrite(|address| changed.contains_key(&address));
            self.datapath.apply(&ops).context("cannot write the kernel's maps")?;
            tracing::info!("other ways lead to {} backend addresses", changed.len());
        }
        Ok(())
    }

    /// Takes in a change of links or addresses. Says where other ways may lead to backends.
    fn take_in(&mut self, change: Change) -> Vec<IpNet> {
        match change {
            Change::Came { ifindex, name, role } => self.attach(ifindex, name, role),
            Change::Went { ifindex, name } => {
                self.failed.remove(&ifindex);
                self.datapath.detach(ifindex, &name);
                tracing::info!("detached from {name} ({ifindex})");
            }
            Change::Listed => self.datapath.detach_others(),
            Change::Addresses(addresses) => {
                self.agent.set_addresses(addresses);
                return netlink::everywhere().into();
            }
            Change::Exits(exits) => self.exits = Some(exits),
            Change::Routes(ranges) => return ranges,
        }
        Vec::new()
    }

    fn attach(&mut self, ifindex: u32, name: String, role: Role) {
        match self.datapath.attach(ifindex, &name, role) {
            Ok(()) => tracing::info!("attached to {} {name} ({ifindex})", role.label()),
            // Most often it has just gone; then netlink says so next.
            Err(error) => {
                tracing::warn!("{error:#}");
                self.failed.insert(ifindex, (name, role));
            }
        }
    }

    /// What is done from time to time.
    fn sweep(&mut self) {
        match self.datapath.sweep() {
            Ok(swept) => self.status.swept(swept),
            Err(error) => tracing::warn!("cannot sweep the flow tables: {error:#}"),
        }
        self.warn_of(
            Outcome::TableFull,
            "the flow table was full: give it more room with --max-flows, after `portal cleanup`",
        );
        self.warn_of(
            Outcome::NoPort,
            "no source port was free to masquerade them: too many flows to one destination",
        );
        for (ifindex, (name, role)) in std::mem::take(&mut self.failed) {
            self.attach(ifindex, name, role);
        }
        self.agent.retry();
    }

    /// Says that packets of new flows were dropped since the last sweep.
    fn warn_of(&mut self, outcome: Outcome, why: &str) {
        let before = self.refused.get(&outcome).copied().unwrap_or_default();
        let count = self.datapath.count(outcome).unwrap_or(before);
        if count > before {
            tracing::warn!("{} packets of new flows were dropped: {why}", count - before);
            self.refused.insert(outcome, count);
        }
    }

    /// Starts the health checks that are not served yet, and says which can't be (KP-107).
    fn serve_checks(&mut self) {
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
