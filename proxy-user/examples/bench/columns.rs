//! What is compared: worlds with the same pods, and who leads from a VIP to them.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use portal::testing::agent::{command, command_in, command_in_pod};
use portal::testing::cluster::Cluster;
use portal::testing::namespace::Namespace;
use portal::testing::neighbour::Neighbour;
use portal::testing::objects::{self, merge};
use portal::testing::world::{Cni, Node, Pod, World};
use serde_json::json;

use crate::load::{IPERF, WEB};
use crate::{rules, web};

/// Who asks, and where the pod is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Door {
    /// A pod, by the `ClusterIP`, a pod of the other node.
    PodToRemote,
    /// A pod, by the `ClusterIP`, a pod of its node.
    PodToLocal,
    /// Someone outside, by the `NodePort`, a pod of the other node.
    OutsideToRemote,
    /// The node itself, by the `ClusterIP`, a pod of the other node.
    NodeToRemote,
}

impl Door {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::PodToRemote, Self::PodToLocal, Self::OutsideToRemote, Self::NodeToRemote];

    /// The door in words.
    pub const fn label(self) -> &'static str {
        match self {
            Self::PodToRemote => "pod → ClusterIP → remote pod",
            Self::PodToLocal => "pod → ClusterIP → local pod",
            Self::OutsideToRemote => "outside → NodePort → remote pod",
            Self::NodeToRemote => "node → ClusterIP → remote pod",
        }
    }
}

/// The Services: of the remote pod, and of the local one.
pub const VIPS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 96, 0, 10), Ipv4Addr::new(10, 96, 0, 11)];
/// The `NodePort` of the first one's web server; that of its iperf3 is the next.
pub const NODE_PORT: u16 = 30_080;

/// Who leads from a VIP to a pod.
enum By {
    /// Nobody: pods are asked by their own addresses.
    Nobody(World),
    /// Agents, which live as long as the column.
    Portal(Cluster),
    /// The kernel's NAT.
    Rules(World, Rules),
}

/// Which of the kernel's two tools writes the rules.
enum Rules {
    /// `nft`.
    Nftables,
    /// `iptables-restore`, unpacked into this folder.
    Iptables(PathBuf),
}

impl By {
    const fn world(&self) -> &World {
        match self {
            Self::Nobody(world) | Self::Rules(world, _) => world,
            Self::Portal(cluster) => &cluster.world,
        }
    }
}

/// How a column's pods are to be led to.
enum Plan<'a> {
    /// By their own addresses.
    Straight,
    /// The same, with programs that do nothing wherever Portal has some.
    Idle,
    /// By the kernel's NAT.
    Nftables,
    /// By the kernel's NAT, and the tools in this folder.
    Iptables(&'a Path),
    /// By a build of Portal, with these arguments.
    Portal(&'a Path, &'a [&'a str]),
}

/// What has uplinks get XDP.
const XDP: &str = "--xdp=native";

/// A world to measure in.
pub struct Column {
    /// Its name.
    pub name: &'static str,
    by: By,
    client: Pod,
    /// The remote pod and the local one.
    servers: [Pod; 2],
    outsider: Namespace,
    _neighbours: Vec<Neighbour>,
}

impl Column {
    /// The straight one, and those of the others that are `wanted` by their names.
    pub fn all(
        programs: &Path,
        tools: &Path,
        other: Option<&Path>,
        services: u16,
        wanted: impl Fn(&str) -> bool,
    ) -> Vec<Self> {
        let portal = &programs.join("portal");
        let mut plans = vec![
            ("straight", Plan::Straight),
            ("idle programs", Plan::Idle),
            ("Portal tc", Plan::Portal(portal, &[])),
            ("Portal sockets", Plan::Portal(portal, &["--socket-lb=all"])),
            ("Portal XDP", Plan::Portal(portal, &[XDP])),
            ("nftables", Plan::Nftables),
            ("iptables", Plan::Iptables(tools)),
        ];
        if let Some(other) = other {
            plans.push(("other Portal", Plan::Portal(other, &[])));
        }
        plans.retain(|(name, plan)| matches!(plan, Plan::Straight) || wanted(name));
        plans.iter().map(|(name, plan)| Self::new(name, services, plan)).collect()
    }

    fn new(name: &'static str, services: u16, plan: &Plan<'_>) -> Self {
        let world = World::new(Cni::Routed);
        for link in ["all", "eth0"] {
            // Who sends by way of a node is not to be told of a shorter way.
            let node = &world.nodes[0].namespace;
            node.sysctl(&format!("net/ipv4/conf/{link}/send_redirects"), "0");
        }
        let outsider = world.outsider();
        let is_xdp = matches!(plan, Plan::Portal(_, arguments) if arguments.contains(&XDP));
        let mut neighbours = if is_xdp { wire_ends(&world) } else { Vec::new() };
        let by = match plan {
            Plan::Straight | Plan::Idle => By::Nobody(world),
            Plan::Nftables => By::Rules(world, Rules::Nftables),
            Plan::Iptables(tools) => By::Rules(world, Rules::Iptables(tools.to_path_buf())),
            Plan::Portal(portal, arguments) => {
                By::Portal(Cluster::start_in(world, portal, arguments))
            }
        };
        let place = by.world();
        let client = place.pod(0, "client");
        let servers = [place.pod(1, "remote"), place.pod(0, "local")];
        for namespace in servers.iter().map(|pod| &pod.namespace).chain([&client.namespace]) {
            namespace.sysctl("net/ipv4/ip_local_port_range", "1024 65535");
        }
        servers.iter().for_each(|pod| web::serve(&pod.namespace, WEB));
        if is_xdp {
            outsider.offload("eth0", false);
            servers[0].namespace.offload("eth0", false);
        }
        if matches!(plan, Plan::Idle) {
            neighbours = idle_programs(by.world(), &[&client, &servers[0], &servers[1]]);
        }
        let column = Self { name, by, client, servers, outsider, _neighbours: neighbours };
        column.lead(services);
        column
    }

    fn world(&self) -> &World {
        self.by.world()
    }

    /// Makes the Services.
    fn lead(&self, others: u16) {
        match &self.by {
            By::Nobody(_) => {}
            By::Rules(_, by) => {
                let pods = [0, 1].map(|number: usize| self.servers[number].v4);
                for node in &self.world().nodes {
                    match by {
                        Rules::Nftables => node.namespace.firewall(&rules::nftables(pods, others)),
                        Rules::Iptables(tools) => {
                            restore(tools, &node.namespace, &rules::iptables(pods, others));
                        }
                    }
                }
            }
            By::Portal(cluster) => {
                for (number, pod) in self.servers.iter().enumerate() {
                    expose(cluster, &format!("s{number}"), VIPS[number], pod, number == 0);
                }
                for number in 0..others {
                    let [high, low] = number.to_be_bytes();
                    let vip = Ipv4Addr::new(10, 97, high, low);
                    expose(cluster, &format!("other{number}"), vip, &self.servers[0], false);
                }
            }
        }
    }

    /// Whom a door's client asks, for a port of the server.
    pub fn target(&self, door: Door, port: u16) -> SocketAddr {
        let number = usize::from(door == Door::PodToLocal);
        let pod = &self.servers[number];
        let (ip, port): (IpAddr, u16) = match (&self.by, door) {
            (By::Nobody(_), _) => (pod.v4.into(), port),
            (_, Door::OutsideToRemote) => {
                (self.world().nodes[0].address(false), NODE_PORT + u16::from(port == IPERF))
            }
            _ => (VIPS[number].into(), port),
        };
        SocketAddr::new(ip, port)
    }

    /// The pod that serves a door.
    pub fn server(&self, door: Door) -> &Pod {
        &self.servers[usize::from(door == Door::PodToLocal)]
    }

    /// A command of a door's client.
    pub fn command(&self, door: Door, program: &Path) -> Command {
        match door {
            Door::NodeToRemote => command(&self.world().nodes[0], program, true),
            Door::OutsideToRemote => command_in(&self.outsider, program),
            Door::PodToRemote | Door::PodToLocal => {
                command_in_pod(&self.world().nodes[0], &self.client, program)
            }
        }
    }
}

/// Has Debian's iptables take rules.
fn restore(tools: &Path, namespace: &Namespace, rules: &str) {
    let libraries = tools.join("usr/lib/x86_64-linux-gnu");
    let mut restore = command_in(namespace, &tools.join("usr/sbin/xtables-nft-multi"));
    restore.arg("iptables-restore").env("XTABLES_LIBDIR", libraries.join("xtables"));
    let child = restore.env("LD_LIBRARY_PATH", libraries).stdin(Stdio::piped()).spawn();
    let mut child = child.expect("iptables is unpacked");
    child.stdin.take().expect("a pipe").write_all(rules.as_bytes()).expect("it reads");
    assert!(child.wait().expect("it ends").success(), "iptables refuses:\n{rules}");
}

/// As on a wire, where XDP needs that: a program at the other end, without which a veth link takes nothing from it.
fn wire_ends(world: &World) -> Vec<Neighbour> {
    world.nodes.iter().map(|node| Neighbour::at_xdp(&world.wire, &node.name)).collect()
}

/// Programs that do nothing, at both hooks of all links that Portal has some at.
fn idle_programs(world: &World, pods: &[&Pod]) -> Vec<Neighbour> {
    let of_node = |node: &Node| {
        let own = pods.iter().filter(|pod| pod.node == node.name);
        let links = own.map(|pod| &*pod.link).chain(["eth0"]);
        links.flat_map(|link| Neighbour::idle(&node.namespace, link)).collect::<Vec<_>>()
    };
    world.nodes.iter().flat_map(of_node).collect()
}

fn expose(cluster: &Cluster, name: &str, vip: Ipv4Addr, pod: &Pod, has_node_port: bool) {
    let ports = [("web", "TCP", WEB), ("bulk", "TCP", IPERF), ("datagrams", "UDP", IPERF)];
    let mut service = objects::service(name, &[vip.into()], &ports);
    if has_node_port {
        let of = |more: u16| json!({"nodePort": NODE_PORT + more});
        merge(&mut service, &json!({"spec": {"type": "NodePort", "ports": [of(0), of(1), of(1)]}}));
    }
    cluster.api.put(service);
    let endpoint = objects::endpoint(pod.address(false), &pod.node);
    cluster.api.put(objects::slice(name, name, &ports, &[endpoint]));
}
