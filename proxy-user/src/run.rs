//! `portal run`: the wiring, and the only place that spawns.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::agent::Agent;
use crate::http::{self, Status};
use crate::kernel::{Datapath, Options};
use crate::netlink::{self, Change, Rule};
use crate::watch::{self, Source, Update};

/// How often the flow tables are swept, and what did not fit is tried again.
const SWEEP: Duration = Duration::from_secs(30);
/// How many links may wait to be attached.
const LINK_QUEUE: usize = 1024;

/// What `portal run` was asked to do, resolved.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The node's name.
    pub node: String,
    /// Where objects come from.
    pub source: Source,
    /// The datapath.
    pub kernel: Options,
    /// What links are for.
    pub interfaces: Vec<Rule>,
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
    let (mut datapath, planner) = Datapath::install(&settings.kernel)?;
    if settings.kernel.trace {
        tasks.spawn(log_packets(datapath.take_log()?));
    }
    let status = Arc::new(Status::new(settings.kernel.bpffs_root.clone()));
    for address in [settings.healthz, settings.metrics].into_iter().flatten() {
        tasks.spawn(http::serve(address, Arc::clone(&status)));
    }
    let updates = watch::start(settings.source, &settings.node, &mut tasks).await?;
    let (changes, links) = mpsc::channel(LINK_QUEUE);
    tasks.spawn(netlink::follow(settings.interfaces, changes));
    let node = Node { agent: Agent::new(&settings.node, planner), datapath, status };
    tracing::info!("portal {} on node {}", env!("CARGO_PKG_VERSION"), settings.node);
    tokio::select! {
        result = node.serve(updates, links) => result,
        Some(ended) = tasks.join_next() => ended?.context("a part of the agent has ended"),
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
}

impl Node {
    /// Carries what is heard into the kernel: at once, and all that has queued up meanwhile in one go.
    async fn serve(
        mut self,
        mut updates: mpsc::Receiver<Update>,
        mut links: mpsc::Receiver<Change>,
    ) -> Result<()> {
        let mut sweeps = interval(SWEEP);
        sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stale: HashSet<u32> = self.datapath.attached_pods().into_iter().collect();
        loop {
            tokio::select! {
                Some(update) = updates.recv() => {
                    self.agent.hear(update);
                    while let Ok(update) = updates.try_recv() {
                        self.agent.hear(update);
                    }
                    self.sync()?;
                }
                Some(change) = links.recv() => self.attach(change, &mut stale),
                _ = sweeps.tick() => {
                    self.sweep();
                    self.agent.retry();
                    self.sync()?;
                }
                else => return Ok(()),
            }
        }
    }

    fn sync(&mut self) -> Result<()> {
        let was_ready = self.status.is_ready();
        let started = Instant::now();
        let ops = self.agent.plan(started);
        if !ops.is_empty() {
            self.datapath.apply(&ops).context("cannot write the kernel's maps")?;
            tracing::debug!("{} writes in {:?}", ops.len(), started.elapsed());
        }
        if self.agent.is_ready() {
            self.status.synced(self.agent.services());
            if !was_ready {
                tracing::info!("in step with the cluster: {} Services", self.agent.services());
            }
        }
        Ok(())
    }

    fn attach(&mut self, change: Change, stale: &mut HashSet<u32>) {
        match change {
            Change::Came { ifindex, name } => {
                stale.remove(&ifindex);
                match self.datapath.attach_pod(ifindex, &name) {
                    Ok(()) => tracing::info!("attached to pod link {name} ({ifindex})"),
                    // Most often it has just gone; then netlink says so next.
                    Err(error) => tracing::warn!("{error:#}"),
                }
            }
            Change::Went { ifindex, name } => {
                self.datapath.detach_pod(ifindex, &name);
                tracing::info!("pod link {name} ({ifindex}) is gone");
            }
            Change::Listed => {
                for ifindex in stale.drain() {
                    self.datapath.detach_pod(ifindex, "");
                }
            }
        }
    }

    fn sweep(&self) {
        match self.datapath.sweep() {
            Ok(swept) => self.status.swept(swept),
            Err(error) => tracing::warn!("cannot sweep the flow tables: {error:#}"),
        }
    }
}
