//! Load: what holds under floods, at sizes at which it would not if something of them stayed.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use portal::testing::cluster::{Cluster, VIPS};
use portal::testing::forged::Forger;
use portal::testing::namespace::Namespace;
use portal::testing::neighbour::{Conduct, Neighbour, Order};
use portal::testing::objects::{self, NODE_PORT, Port, node_ports};
use portal::testing::stage::beside;
use portal::testing::steady::Steady;
use portal::testing::world::{BPFFS, Cni, Node, Pod};
use portal::testing::worlds::bits;
use portal::testing::{eventually, within};
use proxy_common::V4;
use proxy_common::tables::{EmbryoValue, FlowKey, FlowValue, Side};
use proxy_common::testing::Packet;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const HELD: usize = 5_000;
const SYNS: u32 = 100_000;
const DATAGRAMS: u32 = 400_000;
const SHORT: usize = 50_000;
const BACK_TO_BACK: usize = 300_000;
/// The ports of servers that are not the world's own: one that echoes, one that ends each connection.
const ECHO: u16 = 8081;
const BRIEF: u16 = 8082;

/// The ports of the Service.
const PORTS: [Port<'static>; 3] = [("echo", "TCP", 81), ("brief", "TCP", 82), ("udp", "UDP", 80)];

/// Held by each test: together they would need more open files than a process may have.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Two nodes, a Service that echoes and one whose server ends each connection, both on node 1 and of one family.
struct Stage {
    cluster: Cluster,
    v6: bool,
    client: Pod,
    other: Pod,
    outsider: Namespace,
    #[expect(dead_code, reason = "the servers run in its namespace")]
    server: Pod,
    _turn: MutexGuard<'static, ()>,
}

impl Stage {
    fn new(arguments: &[&str]) -> Self {
        Self::of_family(false, arguments)
    }

    fn of_family(v6: bool, arguments: &[&str]) -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
        let cluster =
            Cluster::start(Cni::Routed, Path::new(env!("CARGO_BIN_EXE_portal")), arguments);
        let (client, other) = (cluster.pod(0, "client"), cluster.pod(0, "other"));
        let server = cluster.server(1, "server");
        echo(&server.namespace, ECHO);
        brief(&server.namespace, BRIEF);
        server.namespace.sysctl("net/core/somaxconn", "8192");
        let mut service = objects::service("load", &[VIPS[usize::from(v6)]], &PORTS);
        objects::merge(&mut service, &node_ports_of_three());
        cluster.api.put(service);
        let targets = [("echo", "TCP", ECHO), ("brief", "TCP", BRIEF), ("udp", "UDP", 8080)];
        let endpoint = objects::endpoint(server.address(v6), &server.node);
        cluster.api.put(objects::slice("load", "load", &targets, &[endpoint]));
        let outsider = cluster.world.outsider();
        let stage = Self { cluster, v6, client, other, outsider, server, _turn: turn };
        eventually("the Service is served", || short(&stage.client.namespace, stage.vip(82)).ok());
        eventually("by its NodePort", || short(&stage.outsider, stage.node_port(1)).ok());
        stage
    }

    /// The node that is asked.
    fn node(&self) -> &Namespace {
        &self.cluster.world.nodes[0].namespace
    }

    /// The `NodePort` of a port of the Service, of the node without the pod.
    fn node_port(&self, port: u16) -> SocketAddr {
        let first = self.cluster.node_port(0, self.v6);
        SocketAddr::new(first.ip(), first.port() + port)
    }

    /// A port of the Service at its VIP.
    fn vip(&self, port: u16) -> SocketAddr {
        SocketAddr::new(VIPS[usize::from(self.v6)], port)
    }
}

fn node_ports_of_three() -> serde_json::Value {
    let first = node_ports()["spec"]["ports"][0]["nodePort"].as_u64().unwrap();
    let ports: Vec<_> = (0..3).map(|n| serde_json::json!({"nodePort": first + n})).collect();
    serde_json::json!({"spec": {"type": "NodePort", "ports": ports}})
}

/// Runs a future on a thread of its own in a namespace, for as long as the process lives.
fn in_namespace<F: Future<Output = ()>>(
    namespace: &Namespace,
    future: impl FnOnce() -> F + Send + 'static,
) -> thread::JoinHandle<()> {
    let namespace = namespace.clone();
    thread::spawn(move || {
        namespace.enter();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime.unwrap(), future());
    })
}

/// Of both families.
fn listen(port: u16) -> tokio::net::TcpListener {
    let socket = tokio::net::TcpSocket::new_v6().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind((Ipv6Addr::UNSPECIFIED, port).into()).unwrap();
    socket.listen(8192).unwrap()
}

/// A server that echoes, for thousands at once.
fn echo(namespace: &Namespace, port: u16) {
    in_namespace(namespace, move || async move {
        let listener = listen(port);
        loop {
            let (mut stream, _) = listener.accept().await.expect("as many files as it takes");
            tokio::task::spawn_local(async move {
                let mut bytes = [0; 64];
                while let Ok(length @ 1..) = stream.read(&mut bytes).await {
                    if stream.write_all(&bytes[..length]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// A server that ends each connection as soon as it is there, and so has it in `TIME_WAIT`.
fn brief(namespace: &Namespace, port: u16) {
    in_namespace(namespace, move || async move {
        let listener = listen(port);
        loop {
            listener.accept().await.expect("as many files as it takes");
        }
    });
}

/// A connection that the server ends.
fn short(from: &Namespace, to: SocketAddr) -> std::io::Result<()> {
    from.run(|| short_here(to))
}

fn short_here(to: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(to)?;
    stream.read(&mut [0; 8]).map(drop)
}

/// Connections that echo one byte each, round after round, until they are told to end.
struct Held {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicUsize>,
    lost: Arc<AtomicUsize>,
    thread: thread::JoinHandle<()>,
}

impl Held {
    fn open(from: &Namespace, to: SocketAddr, count: usize) -> Self {
        let (stop, rounds, lost) = (
            Arc::<AtomicBool>::default(),
            Arc::<AtomicUsize>::default(),
            Arc::<AtomicUsize>::default(),
        );
        let (ends, done, failed) = (Arc::clone(&stop), Arc::clone(&rounds), Arc::clone(&lost));
        let thread = in_namespace(from, move || async move {
            let mut streams = Vec::new();
            for _ in 0..count {
                streams.push(tokio::net::TcpStream::connect(to).await.expect("it is served"));
            }
            while !ends.load(Ordering::Relaxed) {
                let mut left = Vec::new();
                for mut stream in streams {
                    let mut byte = [7];
                    let asked = stream.write_all(&byte).await.is_ok();
                    if asked && stream.read_exact(&mut byte).await.is_ok() {
                        left.push(stream);
                    } else {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
                streams = left;
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
        let held = Self { stop, rounds, lost, thread };
        eventually("all are open and echo", || {
            (held.rounds.load(Ordering::Relaxed) > 0).then_some(())
        });
        held
    }

    /// Waits until all have echoed once more.
    fn another_round(&self) {
        let begun = self.rounds.load(Ordering::Relaxed) + 1;
        eventually("another round", || (self.rounds.load(Ordering::Relaxed) > begun).then_some(()));
    }

    /// Ends after one more round; how many were lost.
    fn end(self) -> usize {
        self.another_round();
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("it ends");
        self.lost.load(Ordering::Relaxed)
    }
}

/// SYNs of clients that there are not, each sent twice.
fn flood_of_syns(from: &Namespace, to: SocketAddr) {
    let forger = Forger::new(from);
    for number in 0..SYNS {
        forger.syn(number, to);
        forger.syn(number, to);
    }
}

/// Questions of one datagram, each from a port of its own, which are answered.
fn flood_of_datagrams(from: &Pod, to: SocketAddr) {
    let forger = Forger::new(&from.namespace);
    for number in 0..DATAGRAMS {
        let port = u16::try_from(1024 + number % 64_000).unwrap();
        let source = SocketAddr::new(from.v4.into(), port);
        forger.send(&Packet::udp(Side::Ingress, source, to).with_payload(b"?"));
    }
}

fn floods(arguments: &[&str]) {
    let stage = Stage::new(arguments);
    let held = [
        Held::open(&stage.client.namespace, stage.vip(81), HELD / 2),
        Held::open(&stage.outsider, stage.node_port(0), HELD / 2),
    ];
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        // New connections of another pod, all the while.
        let newcomer = scope.spawn(|| {
            let mut count = 0;
            while !over.load(Ordering::Relaxed) {
                short(&stage.other.namespace, stage.vip(82))
                    .expect("a new connection of another pod");
                count += 1;
            }
            count
        });
        let load = [
            scope.spawn(|| {
                flood_of_syns(&stage.client.namespace, stage.vip(81));
                flood_of_datagrams(&stage.client, stage.vip(80));
            }),
            scope.spawn(|| {
                let connect =
                    |to| stage.outsider.run(|| (0..SHORT / 2).try_for_each(|_| short_here(to)));
                connect(stage.node_port(1)).expect("a short connection by the NodePort");
            }),
            scope.spawn(|| {
                let connect = |to| {
                    stage.client.namespace.run(|| (0..SHORT / 2).try_for_each(|_| short_here(to)))
                };
                connect(stage.vip(82)).expect("a short connection by the VIP");
            }),
        ];
        load.into_iter().for_each(|part| part.join().expect("it ends"));
        over.store(true, Ordering::Relaxed);
        assert!(newcomer.join().expect("it ends") > 100);
    });
    assert_eq!(held.map(Held::end), [0, 0], "connections were lost");
}

#[test]
fn floods_cost_no_connection_and_refuse_no_new_one() {
    floods(&[]);
}

/// The same with room for a tenth of the connections among live flows.
#[test]
fn floods_cost_no_connection_though_the_table_of_live_flows_is_full() {
    floods(&["--max-flows=1000"]);
}

/// A counter of a namespace's TCP, as `nstat` has it.
fn counter(namespace: &Namespace, name: &str) -> u64 {
    let text = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap());
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("TcpExt:")).collect();
    let position = lines[0].split_whitespace().position(|word| word == name).expect("a counter");
    lines[1].split_whitespace().nth(position).unwrap().parse().unwrap()
}

/// From one client through a node without the pod: none is refused, and none had to ask twice because the
/// source port that it got was one that the backend still had in `TIME_WAIT`.
#[test]
fn short_connections_back_to_back_never_meet_the_backends_time_wait() {
    const THREADS: usize = 4;
    let stage = Stage::new(&[]);
    let before = counter(&stage.outsider, "TCPSynRetrans");
    let to = stage.node_port(1);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let connect = || (0..BACK_TO_BACK / THREADS).try_for_each(|_| short_here(to));
                stage.outsider.run(connect).expect("none is refused");
            });
        }
    });
    // A machine that stands still for a second sends those again that are open just then.
    let sent_again = counter(&stage.outsider, "TCPSynRetrans") - before;
    assert!(sent_again <= THREADS as u64, "{sent_again} SYNs were sent again");
    assert_eq!(stage.cluster.outcomes(0, "no_port"), 0);
}

/// Takes every record of a node's flows away, of those that go on and of those that do not.
fn forget_flows(stage: &Stage) {
    fn forget<V: aya::Pod>(name: &str) {
        let map = MapData::from_pin(Path::new(BPFFS).join("portal/maps").join(name)).unwrap();
        let map =
            if name.starts_with("embryos") { Map::LruHashMap(map) } else { Map::HashMap(map) };
        let mut records = HashMap::<_, FlowKey<V4>, V>::try_from(map).unwrap();
        let keys: Vec<_> = records.keys().filter_map(Result::ok).collect();
        // Some may have been taken away by the datapath meanwhile.
        keys.iter().for_each(|key| drop(records.remove(key)));
    }
    stage.cluster.world.nodes[0].mounts.run(|| {
        forget::<FlowValue<V4>>("flows_v4");
        forget::<EmbryoValue<V4>>("embryos_v4");
    });
}

fn ask(connection: &mut TcpStream) {
    connection.write_all(b"?").unwrap();
    let mut answer = [0];
    connection.read_exact(&mut answer).expect("the connection goes on");
    assert_eq!(answer, *b"?");
}

/// The same endpoint and the same source port are found again from the packets alone.
#[test]
fn a_connection_whose_records_are_lost_goes_on_by_each_door() {
    let stage = Stage::new(&[]);
    let doors = [(&stage.client.namespace, stage.vip(81)), (&stage.outsider, stage.node_port(0))];
    let mut connections = Vec::new();
    for (from, to) in doors {
        connections.extend((0..10).map(|_| from.run(|| TcpStream::connect(to).unwrap())));
    }
    for _ in 0..3 {
        connections.iter_mut().for_each(ask);
        // No answer is under way.
        forget_flows(&stage);
    }
    connections.iter_mut().for_each(ask);
}

/// Takes the address of the node that is asked away and puts it back, with the routes that go with it.
fn flap(stage: &mut Stage) {
    let (v6, own) = (stage.v6, stage.cluster.world.nodes[0].address(stage.v6));
    stage.node().netlink(async |net| net.unaddress("eth0", own).await);
    restart(stage);
    let other = &stage.cluster.world.nodes[1];
    stage.node().netlink(async |net| {
        net.address("eth0", own, bits(v6)).await;
        // Those of IPv6 have stayed.
        if !v6 {
            net.route(other.pods(false), bits(false), other.v4().into()).await;
        }
    });
}

/// Takes the route to the other node's pods away and puts it back.
fn reroute(stage: &mut Stage) {
    let other = &stage.cluster.world.nodes[1];
    let (to, prefix, by) = (other.pods(stage.v6), bits(stage.v6), other.address(stage.v6));
    stage.node().netlink(async |net| net.unroute(to, prefix, by).await);
    restart(stage);
    stage.node().netlink(async |net| net.route(to, prefix, by).await);
}

/// Ends the agent of the node that is asked, and starts another one.
fn restart(stage: &mut Stage) {
    stage.cluster.agents[0] = None;
    stage.cluster.start_agent(0);
}

/// More doors from outside: a load balancer's IP and an external one of the pod elsewhere, and the `NodePort` of a pod here.
fn more_doors(stage: &Stage) -> [SocketAddr; 3] {
    const NEAR_PORT: u16 = NODE_PORT + 3;
    let v6 = stage.v6;
    let [balancer, external] = [20, 21].map(|number: u8| -> IpAddr {
        if v6 {
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into()).into()
        } else {
            Ipv4Addr::new(203, 0, 113, number).into()
        }
    });
    let mut far = objects::service("load", &[VIPS[usize::from(v6)]], &PORTS);
    objects::merge(&mut far, &node_ports_of_three());
    let more = serde_json::json!({
        "spec": {"type": "LoadBalancer", "externalIPs": [external]},
        "status": {"loadBalancer": {"ingress": [{"ip": balancer}]}},
    });
    objects::merge(&mut far, &more);
    stage.cluster.api.put(far);
    let near = stage.cluster.server(0, "near");
    echo(&near.namespace, ECHO);
    let echoes = [("echo", "TCP", 81)];
    let mut service = objects::service("near", &[beside(VIPS[usize::from(v6)], 1)], &echoes);
    let ports =
        serde_json::json!({"spec": {"type": "NodePort", "ports": [{"nodePort": NEAR_PORT}]}});
    objects::merge(&mut service, &ports);
    stage.cluster.api.put(service);
    let endpoint = objects::endpoint(near.address(v6), &near.node);
    stage.cluster.api.put(objects::slice("near", "near", &[("echo", "TCP", ECHO)], &[endpoint]));
    let here = SocketAddr::new(stage.node_port(0).ip(), NEAR_PORT);
    let doors = [SocketAddr::new(balancer, 81), SocketAddr::new(external, 81), here];
    for door in doors {
        let connect = || stage.outsider.run(|| TcpStream::connect(door)).ok();
        eventually(&format!("{door} is served"), connect);
    }
    // It serves as long as the process lives, on its own.
    std::mem::forget(near);
    doors
}

/// What happens to nodes while 1,200 connections echo, by each door: from a pod and from the node itself through a VIP, and from
/// outside by four to a pod elsewhere and one here.
#[test]
fn a_thousand_connections_outlive_what_happens_to_links_routes_and_the_agent() {
    [false, true].into_iter().for_each(a_thousand_connections_outlive_what_happens);
}

fn a_thousand_connections_outlive_what_happens(v6: bool) {
    let mut stage = Stage::of_family(v6, &[]);
    let mut held = vec![Held::open(&stage.client.namespace, stage.vip(81), 200)];
    for door in [stage.node_port(0)].into_iter().chain(more_doors(&stage)) {
        held.push(Held::open(&stage.outsider, door, 200));
    }
    eventually("the short cut is taken", || {
        (stage.cluster.outcomes(0, "short_cut") > 1000).then_some(())
    });
    let to = stage.vip(81).to_string();
    let own = RefCell::new(Steady::new(&stage.cluster, 0, &["held-tcp", &to, "200"]));
    let another_round = || {
        held.iter().for_each(Held::another_round);
        assert_eq!(own.borrow_mut().ask().as_deref(), Some("200"), "the node's own");
    };
    another_round();
    let node = stage.node().clone();
    // Each with another agent in the middle of it.
    for _ in 0..2 {
        flap(&mut stage);
        another_round();
        node.netlink(async |net| net.rename("eth0", "lan0").await);
        restart(&mut stage);
        another_round();
        node.netlink(async |net| net.rename("lan0", "eth0").await);
        another_round();
        reroute(&mut stage);
        another_round();
        node.netlink(async |net| net.ingress("eth0", true).await);
        restart(&mut stage);
        another_round();
        node.netlink(async |net| net.ingress("eth0", false).await);
        another_round();
        // Someone else's programs at the same hooks, which let these connections pass: ours goes behind them.
        let nobody = SocketAddr::new(stage.cluster.world.nodes[1].address(v6), 1);
        let links = [("eth0", Order::First), (stage.client.link.as_str(), Order::Last)];
        let neighbours =
            links.map(|(link, order)| Neighbour::join(&node, link, Conduct::Drops(nobody), order));
        another_round();
        restart(&mut stage);
        let last = format!("tc-{}-last", stage.client.ifindex);
        // With the next sweep at the latest.
        within(Duration::from_mins(1), "ours is the last", || {
            stage.cluster.world.nodes[0].pins("links").contains(&last).then_some(())
        });
        another_round();
        drop(neighbours);
        another_round();
        // For a while there is none.
        stage.cluster.agents[0] = None;
        another_round();
        stage.cluster.start_agent(0);
        another_round();
    }
    let lost: Vec<usize> = held.into_iter().map(Held::end).collect();
    assert_eq!(lost, [0; 5]);
}

/// The kernel's tables of connections are as they were, when what has ended is over: of short connections, which went by the host
/// stack, and of long ones, which took the short cut.
#[test]
fn fifty_thousand_connections_leave_nothing_in_the_kernels_tables_of_connections() {
    [false, true].into_iter().for_each(connections_leave_nothing);
}

fn connections_leave_nothing(v6: bool) {
    let stage = Stage::of_family(v6, &[]);
    let followed = |node: &Node| {
        let name = "/proc/sys/net/netfilter/nf_conntrack_count";
        let count = node.namespace.run(|| std::fs::read_to_string(name).unwrap());
        count.trim().parse::<usize>().unwrap()
    };
    for node in &stage.cluster.world.nodes {
        node.namespace.firewall(
            "table inet t {
                chain f { type filter hook forward priority filter; ct state invalid drop;
                }
            }
",
        );
        // The kernel's two minutes, shortened.
        node.namespace.sysctl("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "5");
    }
    let before: Vec<usize> = stage.cluster.world.nodes.iter().map(followed).collect();
    let held = Held::open(&stage.outsider, stage.node_port(0), 1000);
    eventually("the short cut is taken", || {
        (stage.cluster.outcomes(0, "short_cut") > 1000).then_some(())
    });
    let to = stage.node_port(1);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let connect = || (0..SHORT / 2).try_for_each(|_| short_here(to));
                stage.outsider.run(connect).expect("none is refused");
            });
        }
    });
    assert_eq!(held.end(), 0);
    for (node, before) in stage.cluster.world.nodes.iter().zip(before) {
        let most = before + SHORT / 100;
        within(Duration::from_mins(2), "they are forgotten", || {
            (followed(node) <= most).then_some(())
        });
    }
}
