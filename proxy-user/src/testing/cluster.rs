//! A whole cluster: a world, an API server stand-in, and an agent on each node.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::agent::{Agent, command, http, provide_api};
use super::apiserver::ApiServer;
use super::client::udp_socket;
use super::namespace::Namespace;
use super::objects::{self, NODE_PORT, Port};
use super::world::{Cni, Pod, World};
use super::{eventually, server};

/// The port that Services of tests have.
pub const PORT: u16 = 80;
/// The port that servers of tests listen on.
pub const TARGET: u16 = 8080;
/// The TCP and the UDP port of the Services that [`Cluster::expose`] makes.
const SERVICE_PORTS: [Port<'static>; 2] = [("tcp", "TCP", PORT), ("udp", "UDP", PORT)];
const TARGET_PORTS: [Port<'static>; 2] = [("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)];

/// Two virtual IPs of one Service, one of each family.
pub const VIPS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0x10)),
];

/// A cluster of two nodes.
pub struct Cluster {
    /// The agents, by node; `None` while one is stopped.
    pub agents: Vec<Option<Agent>>,
    /// The API server stand-in.
    pub api: ApiServer,
    /// Nodes and pods.
    pub world: World,
    /// What agents are started with.
    pub arguments: Vec<String>,
    pub(super) portal: PathBuf,
}

impl Cluster {
    /// A cluster with its agents ready.
    pub fn start(cni: Cni, portal: &Path, arguments: &[&str]) -> Self {
        Self::start_in(World::new(cni), portal, arguments)
    }

    /// The same in a world that was made before.
    pub fn start_in(world: World, portal: &Path, arguments: &[&str]) -> Self {
        let api = ApiServer::new();
        for node in &world.nodes {
            provide_api(node, &api);
            api.put(objects::node(&node.name, &[node.v4().into(), node.v6().into()]));
        }
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let agents = world.nodes.iter().map(|_| None).collect();
        let mut cluster = Self { agents, api, world, portal: portal.to_owned(), arguments };
        for node in 0..cluster.world.nodes.len() {
            cluster.start_agent(node);
        }
        cluster
    }

    /// Starts the agent of a node and waits until it is ready.
    pub fn start_agent(&mut self, node: usize) {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let place = &self.world.nodes[node];
        let mut agent = Agent::start(place, &self.portal, &arguments);
        agent.wait_ready(place);
        self.agents[node] = Some(agent);
    }

    /// Adds a pod and waits until its node's agent has attached to its link.
    pub fn pod(&self, node: usize, name: &str) -> Pod {
        let pod = self.world.pod(node, name);
        let place = &self.world.nodes[node];
        eventually("the agent attaches to the pod's link", || {
            place.is_attached(&pod).then_some(())
        });
        pod
    }

    /// Adds a pod that serves TCP and UDP, and waits until its node's agent has attached to its link.
    pub fn server(&self, node: usize, name: &str) -> Pod {
        let pod = self.serve_pod(node, name);
        let place = &self.world.nodes[node];
        eventually("the agent attaches to the pod's link", || {
            place.is_attached(&pod).then_some(())
        });
        pod
    }

    /// Adds a pod that serves TCP and UDP.
    pub fn serve_pod(&self, node: usize, name: &str) -> Pod {
        let pod = self.world.pod(node, name);
        for v6 in [false, true] {
            server::tcp(&pod.namespace, name, pod.address(v6), TARGET);
            server::udp(&pod.namespace, name, pod.address(v6), TARGET);
        }
        pod
    }

    /// Makes a Service with a TCP and a UDP port in front of pods, for each family of its VIPs.
    pub fn expose(&self, name: &str, vips: &[IpAddr], pods: &[&Pod]) {
        self.api.put(objects::service(name, vips, &SERVICE_PORTS));
        self.endpoints(name, pods);
    }

    /// Makes a Service as [`Cluster::expose`] does, with more fields in its spec and its status.
    pub fn expose_with(&self, name: &str, vips: &[IpAddr], pods: &[&Pod], more: &Value) {
        let mut service = objects::service(name, vips, &SERVICE_PORTS);
        objects::merge(&mut service, more);
        self.api.put(service);
        self.endpoints(name, pods);
    }

    /// Puts other pods behind a Service, and waits for nothing.
    pub fn endpoints(&self, service: &str, pods: &[&Pod]) {
        for v6 in [false, true] {
            let endpoints: Vec<Value> =
                pods.iter().map(|pod| objects::endpoint(pod.address(v6), &pod.node)).collect();
            let name = format!("{service}-{}", if v6 { "v6" } else { "v4" });
            let mut slice = objects::slice(&name, service, &TARGET_PORTS, &endpoints);
            slice["addressType"] = if v6 { "IPv6" } else { "IPv4" }.into();
            self.api.put(slice);
        }
    }

    /// What `portal-probe` says on a node: its lines, or the kind of its failure.
    ///
    /// # Errors
    /// The failure that it met.
    pub fn probe(&self, node: usize, protocol: &str, to: SocketAddr) -> Result<String, String> {
        self.probe_often(node, protocol, to, 1)
    }

    /// As [`Cluster::probe`], so many times.
    ///
    /// # Errors
    /// The first failure that it met.
    pub fn probe_often(
        &self,
        node: usize,
        protocol: &str,
        to: SocketAddr,
        times: u32,
    ) -> Result<String, String> {
        let program = self.portal.with_file_name("portal-probe");
        let mut probe = command(&self.world.nodes[node], &program, true);
        let arguments = [protocol, &to.to_string(), &times.to_string()];
        let output = probe.args(arguments).output().map_err(|error| error.to_string())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// How often a node's agent counts an outcome.
    pub fn outcomes(&self, node: usize, label: &str) -> u64 {
        let metrics = http(&self.world.nodes[node], 10249, "/metrics").expect("metrics are served");
        let line = format!("portal_outcomes_total{{outcome=\"{label}\"}} ");
        let count = metrics.lines().find_map(|text| text.strip_prefix(&line)).expect("a counter");
        count.parse().expect("a number")
    }

    /// Where a node has the `NodePort` of [`objects::node_ports`].
    pub fn node_port(&self, node: usize, v6: bool) -> SocketAddr {
        SocketAddr::new(self.world.nodes[node].address(v6), NODE_PORT)
    }

    /// Sends a datagram that a node drops, as its counter of an outcome says, and looks whether nobody
    /// was told.
    pub fn assert_dropped(&self, node: usize, outcome: &str, from: &Namespace, to: SocketAddr) {
        let before = self.outcomes(node, outcome);
        let socket = udp_socket(from, to.is_ipv6(), 0).expect("a socket");
        from.run(|| socket.connect(to)).expect("a route");
        socket.send(b"x").expect("a link");
        eventually(outcome, || (self.outcomes(node, outcome) > before).then_some(()));
        socket.set_nonblocking(true).expect("a socket");
        let heard = socket.recv(&mut [0; 64]);
        assert!(matches!(&heard, Err(error) if error.kind() == ErrorKind::WouldBlock), "{heard:?}");
    }

    /// What `portal` prints with `-o json` on a node.
    pub fn list(&self, node: usize, command: &str) -> Vec<Value> {
        let place = &self.world.nodes[node];
        let output = super::agent::portal(place, &self.portal, &[command, "-o", "json"]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "portal {command}: {text}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// Waits until every node's kernel has so many backends behind a VIP's TCP port.
    pub fn wait_backends(&self, vip: IpAddr, count: usize) {
        for node in 0..self.world.nodes.len() {
            eventually(&format!("n{node} has {count} backends for {vip}"), || {
                let services = self.list(node, "services");
                let found = services.iter().find(|service| {
                    service["vip"] == vip.to_string() && service["protocol"] == "TCP"
                });
                let backends = found.map(|service| service["backends"].clone());
                (backends == Some(count.to_string().into())).then_some(())
            });
        }
    }
}

/// Where a Service of [`Cluster::expose`] is reached.
pub fn at(vip: IpAddr) -> SocketAddr {
    SocketAddr::new(vip, PORT)
}
