//! A node with pods, and an API server with many Services.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use portal::testing::agent::{Agent, provide_api};
use portal::testing::apiserver::ApiServer;
use portal::testing::client::tcp_here;
use portal::testing::objects;
use portal::testing::server;
use portal::testing::world::{Cni, Pod, World};

/// The Services' port, and the pods'.
const PORTS: [u16; 2] = [80, 8080];
/// How many Services of the pods there are, beside the one that changes.
const OWN: u32 = 100;

/// A world, what its API server has, and an agent.
pub struct Scene {
    world: World,
    api: ApiServer,
    client: Pod,
    pods: [Pod; 2],
    others: u32,
    agent: Option<Agent>,
}

/// A Service's VIP, by its number.
fn vip(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a60_0100 + number)
}

fn expose(api: &ApiServer, number: u32, endpoints: &[IpAddr]) {
    let name = format!("s{number}");
    let ends: Vec<_> =
        endpoints.iter().map(|address| objects::endpoint(*address, "elsewhere")).collect();
    api.put(objects::slice(&format!("{name}-1"), &name, &[("http", "TCP", PORTS[1])], &ends));
}

/// Ten addresses that no pod has, which differ by `turn`.
fn nobodies(number: u32, turn: u32) -> Vec<IpAddr> {
    let pod = |pod| Ipv4Addr::from_bits(0x0b00_0000 + 20 * number + 10 * (turn % 2) + pod).into();
    (0..10).map(pod).collect()
}

impl Scene {
    /// With so many Services of ten endpoints, beside those of the pods.
    pub fn new(others: u32) -> Self {
        let world = World::new(Cni::Routed);
        let api = ApiServer::new();
        provide_api(&world.nodes[0], &api);
        let client = world.pod(0, "client");
        let pods = ["one", "two"].map(|name| world.pod(0, name));
        for pod in &pods {
            server::tcp(&pod.namespace, &pod.name, pod.v4.into(), PORTS[1]);
        }
        for number in 0..=OWN + others {
            let name = format!("s{number}");
            api.put(objects::service(&name, &[vip(number).into()], &[("http", "TCP", PORTS[0])]));
            if number <= OWN {
                expose(&api, number, &[pods[0].v4.into()]);
            } else {
                expose(&api, number, &nobodies(number, 0));
            }
        }
        Self { world, api, client, pods, others, agent: None }
    }

    /// Starts the agent. How long it takes until a VIP answers.
    pub fn start(&mut self, portal: &Path) -> Duration {
        let begun = Instant::now();
        let mut agent = Agent::start(&self.world.nodes[0], portal, &["--table-size=large"]);
        // What the API server lists last.
        let to = SocketAddr::new(vip(OWN).into(), PORTS[0]);
        let time = self.client.namespace.run(|| {
            // What is asked before there is an answer would be asked again by the kernel after a second.
            while TcpStream::connect_timeout(&to, Duration::from_millis(5)).is_err() {
                assert!(begun.elapsed() < Duration::from_mins(5), "it is never served");
            }
            begun.elapsed()
        });
        agent.wait_ready(&self.world.nodes[0]);
        self.agent = Some(agent);
        time
    }

    /// The agent, once it was started.
    pub fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("it was started")
    }

    /// How long the first connections by VIPs take, and as many to a pod's own address.
    pub fn first_connections(&self) -> [Vec<Duration>; 2] {
        let timed = |to: IpAddr, port| {
            let begun = Instant::now();
            tcp_here(SocketAddr::new(to, port)).expect("it is served");
            begun.elapsed()
        };
        let pod = self.pods[0].v4.into();
        self.client.namespace.run(|| {
            let both =
                (0..OWN).map(|number| (timed(vip(number).into(), PORTS[0]), timed(pod, PORTS[1])));
            let (by_vips, straight) = both.unzip();
            [by_vips, straight]
        })
    }

    /// From a change of the endpoints until a client meets the new one, so often.
    pub fn changes(&self, count: usize) -> Vec<Duration> {
        let to = SocketAddr::new(vip(OWN).into(), PORTS[0]);
        self.client.namespace.run(|| {
            let change = |turn: usize| {
                let pod = &self.pods[(turn + 1) % 2];
                let begun = Instant::now();
                expose(&self.api, OWN, &[pod.v4.into()]);
                while tcp_here(to).expect("someone always serves").server != pod.name {
                    assert!(begun.elapsed() < Duration::from_mins(1), "it is never served");
                }
                begun.elapsed()
            };
            (0..count).map(change).collect()
        })
    }

    /// The same beside so many changes of other Services in a second; and the agent's share of a processor meanwhile.
    pub fn changes_beside(&self, count: usize, others: u32) -> (Vec<Duration>, f64) {
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut turn = 0;
                while !is_over.load(Ordering::Relaxed) {
                    turn += 1;
                    let number = OWN + 1 + turn % self.others;
                    expose(&self.api, number, &nobodies(number, turn / self.others + 1));
                    thread::sleep(Duration::from_secs(1) / others);
                }
            });
            let (begun, before) = (Instant::now(), self.agent().processor_time());
            let mut times = Vec::new();
            // At least some seconds of them.
            while times.len() < count || begun.elapsed() < Duration::from_secs(5) {
                times.extend(self.changes(count));
            }
            let used = self.agent().processor_time().saturating_sub(before);
            is_over.store(true, Ordering::Relaxed);
            (times, used.as_secs_f64() / begun.elapsed().as_secs_f64())
        })
    }
}
