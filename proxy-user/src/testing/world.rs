//! Two nodes with pods, joined by a wire.
//!
//! ```text
//!  pod ── veth ── node 0 ── eth0 ─── wire ─── eth0 ── node 1 ── veth ── pod
//!  10.244.0.x     192.168.50.1               192.168.50.2       10.244.1.x
//!  fd00:244:0::x  fd00:50::1                 fd00:50::2         fd00:244:1::x
//! ```
//!
//! With [`Cni::Bridge`] a node's pods are ports of a bridge, as docker0 and cni0 do it; with
//! [`Cni::Routed`] each pod has a link and a host route, as Calico and ptp do it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::namespace::{Mounts, Namespace};
use super::tunnel::Tunnel;

/// How a node's pods are connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cni {
    /// As ports of a bridge, in one subnet.
    Bridge,
    /// Each by a host route.
    Routed,
}

/// Both shapes, for tests that go over both.
pub const CNIS: [Cni; 2] = [Cni::Bridge, Cni::Routed];

/// The gateway of routed pods.
const GATEWAY4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
const GATEWAY6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// The addresses of [`World::outsider`].
pub const OUTSIDER4: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 100);
/// As [`OUTSIDER4`].
pub const OUTSIDER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x50, 0, 0, 0, 0, 0, 0x100);

/// Two nodes and what they need.
pub struct World {
    /// How pods are connected.
    pub cni: Cni,
    /// The nodes, `n0` and `n1`.
    pub nodes: Vec<Node>,
    /// The link between the nodes.
    pub wire: Namespace,
    cgroup: PathBuf,
}

/// A node.
pub struct Node {
    /// Its number.
    pub number: u8,
    /// Its name.
    pub name: String,
    /// Its network namespace.
    pub namespace: Namespace,
    /// Its mounts, with a bpffs at [`BPFFS`].
    pub mounts: Mounts,
    /// The cgroup of its own processes.
    pub cgroup: PathBuf,
    cni: Cni,
    pods: AtomicU32,
}

/// Where a node's bpffs is.
pub const BPFFS: &str = "/mnt/bpf";

/// A pod.
#[derive(Clone)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its network namespace.
    pub namespace: Namespace,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// The name of its link on the node.
    pub link: String,
    /// The index of its link on the node.
    pub ifindex: u32,
    /// The node it runs on.
    pub node: String,
}

impl Pod {
    /// Its address of a family.
    pub fn address(&self, v6: bool) -> IpAddr {
        if v6 { self.v6.into() } else { self.v4.into() }
    }
}

static WORLDS: AtomicU32 = AtomicU32::new(0);

impl World {
    /// Two nodes without pods.
    pub fn new(cni: Cni) -> Self {
        let root = crate::kernel::probe::cgroup2_mount().expect("cgroup2 is mounted");
        remove_stale_cgroups(&root);
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let cgroup = root.join(format!("portal-test-{}-{number}", std::process::id()));
        let wire = Namespace::new();
        wire.netlink(async |net| {
            net.bridge("wire").await;
            net.up("wire").await;
        });
        let nodes = (0..2).map(|number| Node::new(number, cni, &wire, &cgroup)).collect();
        let world = Self { cni, nodes, wire, cgroup };
        world.connect_nodes();
        world
    }

    /// Routes to the other node's pods.
    fn connect_nodes(&self) {
        for (node, other) in [(&self.nodes[0], &self.nodes[1]), (&self.nodes[1], &self.nodes[0])] {
            node.namespace.netlink(async |net| {
                net.route(node.pods4(other.number, 0).into(), 24, other.v4().into()).await;
                net.route(node.pods6(other.number, 0).into(), 64, other.v6().into()).await;
            });
        }
    }

    /// Sends what goes from node to node's pods through a vxlan tunnel from now on.
    pub fn overlay(&self) {
        for (node, other) in [(&self.nodes[0], &self.nodes[1]), (&self.nodes[1], &self.nodes[0])] {
            node.namespace.netlink(async |net| net.vxlan("vxlan0", other.v4()).await);
        }
        self.route_by("vxlan0");
    }

    /// As [`World::overlay`], through a tunnel whose packets have no Ethernet headers.
    pub fn tunnel(&self, mtu: u32) -> Tunnel {
        let tunnel = Tunnel::new("tun0", [&self.nodes[0].namespace, &self.nodes[1].namespace]);
        for node in &self.nodes {
            node.namespace.netlink(async |net| net.mtu("tun0", mtu).await);
        }
        self.route_by("tun0");
        tunnel
    }

    /// Gives a link between the nodes addresses, and leads what goes to the other node's pods there.
    fn route_by(&self, link: &str) {
        for (node, other) in [(&self.nodes[0], &self.nodes[1]), (&self.nodes[1], &self.nodes[0])] {
            node.namespace.netlink(async |net| {
                net.up(link).await;
                net.address(link, node.overlay4().into(), 24).await;
                net.address(link, node.overlay6().into(), 64).await;
                for (to, bits, old, new) in [
                    (IpAddr::from(node.pods4(other.number, 0)), 24, false, other.overlay4().into()),
                    (IpAddr::from(node.pods6(other.number, 0)), 64, true, other.overlay6().into()),
                ] {
                    net.unroute(to, bits, other.address(old)).await;
                    net.route(to, bits, new).await;
                }
            });
        }
    }

    /// A machine on the wire that is no node: it knows nothing of pods, and sends what it has no route
    /// for to node 0.
    pub fn outsider(&self) -> Namespace {
        let namespace = Namespace::new();
        self.wire.netlink(async |net| {
            net.port("outsider", "eth0", &namespace, "wire").await;
        });
        let node = &self.nodes[0];
        namespace.netlink(async |net| {
            net.up("eth0").await;
            net.address("eth0", OUTSIDER4.into(), 24).await;
            net.address("eth0", OUTSIDER6.into(), 64).await;
            net.route(Ipv4Addr::UNSPECIFIED.into(), 0, node.v4().into()).await;
            net.route(Ipv6Addr::UNSPECIFIED.into(), 0, node.v6().into()).await;
        });
        namespace
    }

    /// Adds a pod to a node.
    pub fn pod(&self, node: usize, name: &str) -> Pod {
        self.nodes[node].pod(name)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for node in &self.nodes {
            let _ = fs::remove_dir(&node.cgroup);
        }
        let _ = fs::remove_dir(&self.cgroup);
    }
}

/// Removes the empty cgroups of tests that were killed.
fn remove_stale_cgroups(root: &Path) {
    let Ok(entries) = fs::read_dir(root) else { return };
    for entry in entries.filter_map(Result::ok) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix("portal-test-") else { continue };
        let pid = rest.split('-').next().unwrap_or_default();
        if Path::new("/proc").join(pid).exists() {
            continue;
        }
        for inner in fs::read_dir(entry.path()).into_iter().flatten().filter_map(Result::ok) {
            let _ = fs::remove_dir(inner.path());
        }
        let _ = fs::remove_dir(entry.path());
    }
}

impl Node {
    fn new(number: u8, cni: Cni, wire: &Namespace, cgroups: &Path) -> Self {
        let name = format!("n{number}");
        let cgroup = cgroups.join(&name);
        fs::create_dir_all(&cgroup).expect("cgroups need root");
        let (namespace, mounts) = (Namespace::new(), Mounts::new());
        mounts.bpffs(BPFFS);
        let pods = AtomicU32::new(0);
        let node = Self { number, name, namespace, mounts, cgroup, cni, pods };
        node.namespace.sysctl("net/ipv4/ip_forward", "1");
        node.namespace.sysctl("net/ipv6/conf/all/forwarding", "1");
        let port = node.name.clone();
        wire.netlink(async |net| {
            net.port(&port, "eth0", &node.namespace, "wire").await;
        });
        node.namespace.netlink(async |net| {
            net.up("eth0").await;
            net.address("eth0", node.v4().into(), 24).await;
            net.address("eth0", node.v6().into(), 64).await;
            // Somewhere to send VIPs to, as real nodes have: a socket's connect looks for a route.
            net.route(Ipv4Addr::UNSPECIFIED.into(), 0, Ipv4Addr::new(192, 168, 50, 254).into())
                .await;
            net.route(Ipv6Addr::UNSPECIFIED.into(), 0, v6([0xfd00, 0x50, 0, 0xfe])).await;
            if cni == Cni::Bridge {
                net.bridge("cni0").await;
                net.up("cni0").await;
                net.address("cni0", node.pods4(number, 1).into(), 24).await;
                net.address("cni0", node.pods6(number, 1).into(), 64).await;
            }
        });
        node
    }

    /// Its address of a family.
    pub fn address(&self, v6: bool) -> IpAddr {
        if v6 { self.v6().into() } else { self.v4().into() }
    }

    /// Its IPv4 address.
    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 168, 50, self.number + 1)
    }

    /// Its IPv6 address.
    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x50, 0, 0, 0, 0, 0, u16::from(self.number) + 1)
    }

    fn overlay4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, 0, self.number + 1)
    }

    fn overlay6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, u16::from(self.number) + 1)
    }

    /// The range of its pods: of 24 bits, or of 64.
    pub fn pods(&self, v6: bool) -> IpAddr {
        if v6 { self.pods6(self.number, 0).into() } else { self.pods4(self.number, 0).into() }
    }

    fn pods4(&self, node: u8, host: u8) -> Ipv4Addr {
        let _ = self;
        Ipv4Addr::new(10, 244, node, host)
    }

    fn pods6(&self, node: u8, host: u16) -> Ipv6Addr {
        let _ = self;
        Ipv6Addr::new(0xfd00, 0x244, u16::from(node), 0, 0, 0, 0, host)
    }

    /// Adds a pod.
    pub fn pod(&self, name: &str) -> Pod {
        let number = self.pods.fetch_add(1, Ordering::Relaxed);
        let host = u8::try_from(number + 10).expect("a few hundred pods");
        let namespace = Namespace::new();
        let link = format!("veth{number}");
        let ifindex = self.namespace.netlink(async |net| {
            net.veth(&link, "eth0", &namespace).await;
            net.index(&link).await
        });
        let mut pod = Pod {
            name: name.to_owned(),
            namespace,
            v4: self.pods4(self.number, host),
            v6: self.pods6(self.number, host.into()),
            link,
            ifindex,
            node: self.name.clone(),
        };
        match self.cni {
            Cni::Bridge => self.connect_bridged(&pod),
            Cni::Routed => self.connect_routed(&pod),
        }
        pod.ifindex = ifindex;
        pod
    }

    fn connect_bridged(&self, pod: &Pod) {
        self.namespace.netlink(async |net| {
            net.enslave(&pod.link, "cni0").await;
            net.up(&pod.link).await;
        });
        pod.namespace.netlink(async |net| {
            net.up("eth0").await;
            net.address("eth0", pod.v4.into(), 24).await;
            net.address("eth0", pod.v6.into(), 64).await;
            let gateway = self.pods4(self.number, 1);
            net.route(Ipv4Addr::UNSPECIFIED.into(), 0, gateway.into()).await;
            net.route(Ipv6Addr::UNSPECIFIED.into(), 0, self.pods6(self.number, 1).into()).await;
        });
    }

    fn connect_routed(&self, pod: &Pod) {
        self.namespace.netlink(async |net| {
            net.up(&pod.link).await;
            net.address(&pod.link, GATEWAY4, 32).await;
            net.address(&pod.link, GATEWAY6, 64).await;
            net.link_route(pod.v4.into(), 32, &pod.link).await;
            net.link_route(pod.v6.into(), 128, &pod.link).await;
        });
        pod.namespace.netlink(async |net| {
            net.up("eth0").await;
            net.address("eth0", pod.v4.into(), 32).await;
            net.address("eth0", pod.v6.into(), 128).await;
            net.link_route(GATEWAY4, 32, "eth0").await;
            net.route(Ipv4Addr::UNSPECIFIED.into(), 0, GATEWAY4).await;
            net.route_by(Ipv6Addr::UNSPECIFIED, 0, GATEWAY6, "eth0").await;
        });
    }

    /// Removes a pod's link, as when the pod is deleted.
    pub fn remove_pod(&self, pod: &Pod) {
        self.namespace.netlink(async |net| net.remove(&pod.link).await);
    }

    /// The names of what an agent has pinned in a folder of its bpffs root.
    pub fn pins(&self, folder: &str) -> Vec<String> {
        self.mounts.run(|| {
            let entries = fs::read_dir(Path::new(BPFFS).join("portal").join(folder));
            let names = entries.into_iter().flatten().filter_map(Result::ok);
            names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        })
    }

    /// Whether an agent has attached to a pod's link.
    pub fn is_attached(&self, pod: &Pod) -> bool {
        // The last of its programs.
        self.pins("links").contains(&format!("tc-{}-ingress", pod.ifindex))
    }
}

fn v6(head: [u16; 4]) -> IpAddr {
    Ipv6Addr::new(head[0], head[1], head[2], 0, 0, 0, 0, head[3]).into()
}
