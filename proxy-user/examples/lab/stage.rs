//! The stage: the cluster, and what is asked of it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, Map, MapData};
use portal::kernel::name_of;
use portal::testing::cluster::{Cluster, VIPS, at};
use portal::testing::objects::node_ports;
use portal::testing::world::{BPFFS, Cni, Node, Pod};
use portal::testing::{agent, client, eventually};
use proxy_common::tables::{Range, ServiceKey, ServiceValue, Slots};
use proxy_common::{Family, V4, V6};

use super::show::{Show, command, say, title};

/// The Service's name.
pub const SERVICE: &str = "webfrontend";
/// The cluster with its actors.
pub struct Stage {
    /// Nodes, agents, API server.
    pub cluster: Cluster,
    /// The pod that asks.
    pub client: Pod,
    /// The pods that answer.
    pub web: Vec<Pod>,
    programs: PathBuf,
}

impl Stage {
    /// Builds the world: a client on node 0, two web pods on each node.
    pub fn build(cni: Cni, programs: &Path) -> Self {
        let cluster = Cluster::start(cni, &programs.join("portal"), &[]);
        let client = cluster.pod(0, "client");
        let places = [(0, "web-a"), (0, "web-b"), (1, "web-c"), (1, "web-d")];
        let web: Vec<Pod> = places.iter().map(|(node, name)| cluster.server(*node, name)).collect();
        let stage = Self { cluster, client, web, programs: programs.to_owned() };
        stage.serve(&stage.web);
        stage
    }

    /// Shows who is there.
    pub fn introduce(&self) {
        say("");
        for (node, place) in self.cluster.world.nodes.iter().enumerate() {
            let mut pods: Vec<&Pod> =
                self.web.iter().filter(|pod| pod.node == place.name).collect();
            if node == 0 {
                pods.insert(0, &self.client);
            }
            let pods: Vec<String> = pods.iter().map(|p| format!("{} {}", p.name, p.v4)).collect();
            say(format!("node {}  {}   {}", place.name, place.v4(), pods.join("   ")));
        }
        say("");
        command("portal services", &self.portal(0, &["services"]));
    }

    /// Where the Service is reached.
    pub fn vip(v6: bool) -> SocketAddr {
        at(VIPS[usize::from(v6)])
    }

    /// Puts pods behind the Service. Returns how long the kernels took to know.
    pub fn serve(&self, pods: &[Pod]) -> Duration {
        let pods: Vec<&Pod> = pods.iter().collect();
        let started = Instant::now();
        self.cluster.expose_with(SERVICE, &VIPS, &pods, &node_ports());
        for node in &self.cluster.world.nodes {
            eventually("the kernel knows", || Self::knows(node, pods.len()).then_some(()));
        }
        started.elapsed()
    }

    /// Whether a node's kernel holds so many backends for each of the Service's ports.
    fn knows(node: &Node, backends: usize) -> bool {
        node.mounts.run(|| counts::<V4>() == [backends; 4] && counts::<V6>() == [backends; 4])
    }

    /// Connects so often from the client and counts who answered.
    pub fn connect(&self, times: u32) -> io::Result<BTreeMap<String, u32>> {
        let mut counts = BTreeMap::new();
        for _ in 0..times {
            let connection = client::tcp(&self.client.namespace, Self::vip(false))?;
            *counts.entry(connection.server).or_default() += 1;
        }
        Ok(counts)
    }

    /// Sends a datagram from so many sockets of the client and counts who answered.
    pub fn send(&self, times: u32, v6: bool) -> io::Result<BTreeMap<String, u32>> {
        let mut counts = BTreeMap::new();
        for _ in 0..times {
            let answer = client::udp(&self.client.namespace, Self::vip(v6), b"hello")?;
            *counts.entry(answer.server).or_default() += 1;
        }
        Ok(counts)
    }

    /// The counts of all web pods, those without any included.
    pub fn bars(&self, counts: &BTreeMap<String, u32>) -> Vec<(String, u32)> {
        let count = |pod: &Pod| counts.get(&pod.name).copied().unwrap_or_default();
        self.web.iter().map(|pod| (pod.name.clone(), count(pod))).collect()
    }

    /// What a process on a node gets: lines of server, client as seen, and peer; or the failure.
    pub fn probe(
        &self,
        node: usize,
        protocol: &str,
        times: u32,
    ) -> Result<Vec<[String; 3]>, String> {
        let text = self.cluster.probe_often(node, protocol, Self::vip(false), times)?;
        let line = |line: &str| {
            let mut words = line.split(' ').map(str::to_owned);
            [(); 3].map(|()| words.next().unwrap_or_default())
        };
        Ok(text.lines().map(line).collect())
    }

    /// What `portal` prints on a node.
    pub fn portal(&self, node: usize, arguments: &[&str]) -> String {
        let place = &self.cluster.world.nodes[node];
        let output = agent::portal(place, &self.programs.join("portal"), arguments);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Prints commands to look around.
    pub fn invite(&self) {
        let process = std::process::id();
        let enter = |fd: i32| format!("nsenter --net=/proc/{process}/fd/{fd}");
        let portal = self.programs.join("portal");
        let portal = portal.display();
        title("The lab stays up. In another terminal, as root:", "");
        say("# as the client: any tool will do");
        let client = enter(self.client.namespace.fd().as_raw_fd());
        say(format!("{client} curl -s telnet://{} </dev/null", Self::vip(false)));
        say(format!("{client} tcpdump -ni eth0"));
        for node in &self.cluster.world.nodes {
            let net = enter(node.namespace.fd().as_raw_fd());
            let mounts = format!("--mount=/proc/{process}/fd/{}", node.mounts.fd().as_raw_fd());
            say(format!("# on node {}", node.name));
            say(format!("{net} {mounts} {portal} flows --bpffs-root {BPFFS}/portal"));
            say(format!("{net} {mounts} bpftool map dump pinned {BPFFS}/portal/maps/services_v4"));
        }
    }

    /// Takes everything down and looks whether it is gone.
    pub fn tear_down(self, show: &mut Show) {
        show.scene("Clean-up");
        let nodes = &self.cluster.world.nodes;
        let groups: Vec<PathBuf> = nodes.iter().map(|node| node.cgroup.clone()).collect();
        let mut cleaned = true;
        let Self { mut cluster, programs, .. } = self;
        for node in 0..cluster.world.nodes.len() {
            drop(cluster.agents[node].take());
            let place = &cluster.world.nodes[node];
            let output = agent::portal(place, &programs.join("portal"), &["cleanup"]);
            cleaned &= output.status.success() && place.pins("").is_empty();
        }
        show.check(cleaned, "`portal cleanup` left no program, map or pin on the nodes");
        drop(cluster);
        let gone = groups.iter().all(|group| !group.exists());
        show.check(gone, "namespaces, mounts and cgroups of the lab are gone");
    }
}

/// How many backends each frontend of a family leads to in the kernel of the node that the thread is on.
fn counts<F: Family>() -> Vec<usize> {
    let maps = Path::new(BPFFS).join("portal/maps");
    let open = |name: &str| MapData::from_pin(maps.join(name)).expect("a pinned map");
    let services = Map::HashMap(open(&name_of::<F>("services")));
    let services = HashMap::<_, ServiceKey<F>, ServiceValue>::try_from(services).expect("Services");
    let slots = Array::<_, Slots>::try_from(Map::Array(open("slots"))).expect("slots");
    let slot = |index: u32| Some(slots.get(&(index / 2), 0).ok()?.numbers[index as usize % 2]);
    let frontends =
        services.iter().filter_map(Result::ok).filter(|(key, _)| key.port.number() != 0);
    let backends = frontends.map(|(_, ServiceValue { cluster, .. })| {
        let position = |index| match cluster.table {
            Range::NO_TABLE => Some(index),
            table => slot(table + index),
        };
        let numbers =
            (0..cluster.count).filter_map(|index| slot(cluster.members + position(index)?));
        numbers.collect::<BTreeSet<u32>>().len()
    });
    backends.collect()
}
