//! `portal run`: the wiring.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use aya_log::EbpfLogger;
use ipnet::IpNet;
use proxy_common::tables::Algorithm;
use serde_json::Value;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::sync::watch::Sender;
use tokio::task::JoinSet;

use crate::agent::Agent;
use crate::catch_all;
use crate::desired::node_ports::NodePortAddresses;
use crate::events::{Events, Notice};
use crate::health::HealthChecks;
use crate::http::{self, Status};
use crate::kernel::{Datapath, Options};
use crate::links::Rule;
use crate::memory;
use crate::model::{self, ObjectName};
use crate::netlink;
use crate::node::{Node, Parts};
use crate::routes::Resolver;
use crate::watch::{self, Source};

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
    /// Whether what goes to VIPs past the programs of pods' links is caught where it leaves.
    pub catches: bool,
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

async fn follow(mut settings: Settings) -> Result<()> {
    let mut tasks = JoinSet::new();
    // First what may fail without a trace.
    let kinds = watch::kinds(settings.host_ports);
    let events = Events::start(&settings.source, &settings.node, &mut tasks).await?;
    let updates = watch::start(settings.source, &settings.node, kinds.clone(), &mut tasks).await?;
    settings.kernel.catch_all =
        catch_all::prepare(settings.catches, &settings.kernel.bpffs_root).await;
    let (mut datapath, planner) = Datapath::install(&settings.kernel)?;
    memory::trim();
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
    let vips = Sender::new(planner.cluster_ips().collect());
    let mut agent = Agent::new(own, settings.node_ports, kinds, planner);
    datapath.apply(&agent.except_from_masquerade(&settings.masquerade_except))?;
    let (changes, links) = mpsc::channel(LINK_QUEUE);
    tasks.spawn(netlink::follow(settings.interfaces, changes));
    if settings.kernel.catch_all != 0 {
        tasks.spawn(catch_all::follow(
            settings.kernel.catch_all,
            settings.kernel.bpffs_root.clone(),
            vips.subscribe(),
        ));
    }
    let routes = Resolver::new()?;
    let told = Arc::clone(&status);
    let checks = HealthChecks::new(Arc::new(move || told.is_healthy()));
    let name = settings.node;
    tracing::info!("portal {} on node {name}", env!("CARGO_PKG_VERSION"));
    events.tell(starting(&name));
    let except = settings.masquerade_except;
    let node =
        Node::new(Parts { agent, datapath, status, routes, checks, events, name, except, vips });
    tokio::select! {
        () = node.serve(updates, links) => Ok(()),
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
