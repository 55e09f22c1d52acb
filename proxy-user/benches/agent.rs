//! What a change costs the agent, from the object heard to the writes planned: `cargo bench -p proxy-user`.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use divan::Bencher;
use portal::agent::Agent;
use portal::desired::node_ports::NodePortAddresses;
use portal::model::{Node, ObjectName};
use portal::plan::{Capacity, Op, Planner};
use portal::watch::{Kind, Update, kinds, raw};
use serde_json::json;

/// Endpoints of a slice, as Kubernetes' controller fills them.
const OF_A_SLICE: u32 = 100;

fn main() {
    divan::main();
}

/// An agent that has heard of a cluster, and a clock.
struct Cluster {
    agent: Agent,
    now: Instant,
}

impl Cluster {
    /// So many Services of so many endpoints each, on a hundred nodes.
    fn new(services: u32, endpoints: u32) -> Self {
        let node = Node { name: "n0".to_owned(), ..Node::default() };
        let planner = Planner::new(Capacity::DEFAULT);
        let agent = Agent::new(node, NodePortAddresses::Primary, kinds(false), planner);
        let mut cluster = Self { agent, now: Instant::now() };
        let (mut names, mut slices) = (HashSet::new(), HashSet::new());
        for number in 0..services {
            names.insert(object(&format!("s{number}")));
            cluster.agent.hear(service(number));
            for part in 0..endpoints.div_ceil(OF_A_SLICE) {
                slices.insert(object(&slice_name(number, part)));
                cluster.agent.hear(slice(number, part, endpoints.min(OF_A_SLICE), 0));
            }
        }
        cluster.agent.hear(Update::Listed(Kind::Services, names));
        cluster.agent.hear(Update::Listed(Kind::Slices, slices));
        cluster.agent.hear(Update::Listed(Kind::Nodes, [object("n0")].into()));
        cluster
    }

    /// The writes that follow, long after those before.
    fn plan(&mut self) -> Vec<Op> {
        self.now += Duration::from_secs(2);
        let mut ops = self.agent.plan(self.now);
        while !self.agent.is_settled() {
            self.now += Duration::from_secs(2);
            ops.extend(self.agent.plan(self.now));
        }
        ops
    }
}

fn object(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

fn service(number: u32) -> Update {
    let vip = std::net::Ipv4Addr::from_bits(0x0a60_0000 + number);
    let service = serde_json::from_value::<raw::Service>(json!({
        "metadata": {"name": format!("s{number}"), "namespace": "default"},
        "spec": {"clusterIP": vip, "ports": [{"port": 80}]},
    }));
    Update::Service(Box::new(service.unwrap()))
}

fn slice_name(service: u32, part: u32) -> String {
    format!("s{service}-{part:04}")
}

/// A part of a Service's endpoints; each `version` has other ones.
fn slice(service: u32, part: u32, endpoints: u32, version: u32) -> Update {
    let first = 0x0b00_0000 + ((service * 16) << 8) + part * 2 * OF_A_SLICE + version * OF_A_SLICE;
    let endpoint = |number: u32| {
        let address = std::net::Ipv4Addr::from_bits(first + number.wrapping_mul(7) % endpoints);
        let node = format!("node-{:03}", (part * 31 + number) % 100);
        json!({"addresses": [address], "nodeName": node, "conditions": {"ready": true}})
    };
    let slice = serde_json::from_value::<raw::EndpointSlice>(json!({
        "metadata": {
            "name": slice_name(service, part),
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": format!("s{service}")},
        },
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080}],
        "endpoints": (0..endpoints).map(endpoint).collect::<Vec<_>>(),
    }));
    Update::Slice(slice.unwrap())
}

/// One slice gets other endpoints, back and forth.
fn change_one_slice(bencher: Bencher<'_, '_>, services: u32, endpoints: u32) {
    let mut cluster = Cluster::new(services, endpoints);
    cluster.plan();
    let mut version = 0;
    let change = || {
        version = 1 - version;
        slice(services / 2, endpoints.div_ceil(OF_A_SLICE) / 2, endpoints.min(OF_A_SLICE), version)
    };
    bencher.with_inputs(change).bench_local_values(|change| {
        cluster.agent.hear(change);
        let ops = cluster.plan();
        assert!(!ops.is_empty());
        ops
    });
}

#[divan::bench(args = [1_000, 10_000, 30_000])]
fn a_slice_among_services_of_10_endpoints(bencher: Bencher<'_, '_>, services: u32) {
    change_one_slice(bencher, services, 10);
}

#[divan::bench(args = [100, 1_000, 10_000, 100_000])]
fn a_slice_of_a_service_with_endpoints(bencher: Bencher<'_, '_>, endpoints: u32) {
    change_one_slice(bencher, 1, endpoints);
}

#[divan::bench(args = [1_000, 10_000, 30_000], sample_count = 3)]
fn the_first_plan_of_services_of_10_endpoints(bencher: Bencher<'_, '_>, services: u32) {
    bencher
        .with_inputs(|| Cluster::new(services, 10))
        .bench_local_values(|mut cluster| (cluster.plan(), cluster));
}
