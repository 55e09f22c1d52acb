//! The agent between what it hears and what it writes, without a kernel or a cluster.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use portal::agent::Agent;
use portal::desired::node_ports::NodePortAddresses;
use portal::model::{Node, ObjectName};
use portal::plan::{Capacity, Op, Planner};
use portal::watch::{Kind, Update, kinds, raw};
use proxy_common::tables::{Algorithm, ServiceValue};
use serde_json::json;

const ROOMY: Capacity = Capacity { services: 100, slots: 100, backends: 100, ranges: 100 };

fn agent(capacity: Capacity) -> Agent {
    // One slot for each backend.
    let algorithm = Algorithm::RoundRobin;
    let node = Node { name: "n0".to_owned(), algorithm, ..Node::default() };
    Agent::new(node, NodePortAddresses::Primary, kinds(true), Planner::new(capacity))
}

fn object(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

fn service(name: &str, host: u8) -> Update {
    let service: raw::Service = serde_json::from_value(json!({
        "metadata": {
            "name": name,
            "namespace": "default",
            "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"clusterIP": format!("10.96.0.{host}"), "ports": [{"port": 80}]},
    }))
    .unwrap();
    Update::Service(Box::new(service))
}

fn slice(name: &str, service: &str, hosts: &[u8]) -> Update {
    let endpoints: Vec<_> =
        hosts.iter().map(|host| json!({"addresses": [format!("10.0.0.{host}")]})).collect();
    let slice: raw::EndpointSlice = serde_json::from_value(json!({
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080}],
        "endpoints": endpoints,
    }))
    .unwrap();
    Update::Slice(slice)
}

fn listed(kind: Kind, names: &[&str]) -> Update {
    Update::Listed(kind, names.iter().map(|name| object(name)).collect::<HashSet<_>>())
}

fn list_all(agent: &mut Agent, services: &[&str], slices: &[&str]) {
    agent.hear(listed(Kind::Services, services));
    agent.hear(listed(Kind::Slices, slices));
    agent.hear(listed(Kind::Nodes, &["n0"]));
    agent.hear(listed(Kind::Pods, &[]));
}

/// The frontends that writes lead to so many slots, by the VIP's last byte.
fn leads(ops: &[Op]) -> Vec<(u8, u32)> {
    let lead = |op: &Op| match op {
        Op::Lead { frontend, lead } => {
            let vip = frontend.vip.to_string();
            Some((vip.rsplit('.').next()?.parse().ok()?, lead.cluster.count))
        }
        _ => None,
    };
    ops.iter().filter_map(lead).collect()
}

fn removals(ops: &[Op]) -> usize {
    ops.iter().filter(|op| matches!(op, Op::Remove { .. })).count()
}

#[test]
fn kp_126_nothing_is_written_before_everything_was_listed() {
    let mut agent = agent(ROOMY);
    let now = Instant::now();
    agent.hear(service("web", 1));
    agent.hear(slice("web-1", "web", &[1]));
    for kind in [Kind::Services, Kind::Slices] {
        assert_eq!(agent.plan(now), []);
        agent.hear(listed(kind, &["web", "web-1"]));
    }
    assert_eq!(agent.plan(now), []);
    agent.hear(listed(Kind::Nodes, &["n0"]));
    agent.hear(listed(Kind::Pods, &[]));
    assert_eq!(leads(&agent.plan(now)), [(1, 1)]);
}

#[test]
fn kp_22_and_23_order_does_not_matter_and_no_change_writes_nothing() {
    let mut agent = agent(ROOMY);
    let now = Instant::now();
    agent.hear(slice("web-1", "web", &[1, 2]));
    list_all(&mut agent, &[], &["web-1"]);
    assert_eq!(agent.plan(now), []);
    agent.hear(service("web", 1));
    assert_eq!(leads(&agent.plan(now)), [(1, 2)]);
    agent.hear(service("web", 1));
    agent.hear(slice("web-1", "web", &[1, 2]));
    assert_eq!(agent.plan(now), []);
    // A change and its undoing between two plans are no change.
    agent.hear(slice("web-1", "web", &[1]));
    agent.hear(slice("web-1", "web", &[1, 2]));
    assert_eq!(agent.plan(now), []);
}

#[test]
fn a_list_removes_what_it_does_not_show() {
    let mut agent = agent(ROOMY);
    let now = Instant::now();
    agent.hear(service("one", 1));
    agent.hear(service("two", 2));
    list_all(&mut agent, &["one", "two"], &[]);
    assert_eq!(leads(&agent.plan(now)), [(1, 0), (2, 0)]);
    agent.hear(listed(Kind::Services, &["two"]));
    assert_eq!(removals(&agent.plan(now)), 1);
}

#[test]
fn a_slice_that_changes_hands_concerns_both_services() {
    let mut agent = agent(ROOMY);
    let now = Instant::now();
    agent.hear(service("one", 1));
    agent.hear(service("two", 2));
    agent.hear(slice("a", "one", &[1]));
    list_all(&mut agent, &["one", "two"], &["a"]);
    assert_eq!(leads(&agent.plan(now)), [(1, 1), (2, 0)]);
    agent.hear(slice("a", "two", &[1]));
    assert_eq!(leads(&agent.plan(now)), [(1, 0), (2, 1)]);
    agent.hear(Update::Gone(Kind::Slices, object("a")));
    assert_eq!(leads(&agent.plan(now)), [(2, 0)]);
}

#[test]
fn what_does_not_fit_keeps_what_it_has_and_is_tried_again() {
    let mut agent = agent(Capacity { services: 10, slots: 10, backends: 3, ranges: 10 });
    let now = Instant::now();
    agent.hear(service("one", 1));
    agent.hear(service("two", 2));
    agent.hear(slice("a", "one", &[1, 2]));
    agent.hear(slice("b", "two", &[3]));
    list_all(&mut agent, &["one", "two"], &["a", "b"]);
    assert_eq!(leads(&agent.plan(now)), [(1, 2), (2, 1)]);
    // Three backends are all that fit.
    agent.hear(slice("b", "two", &[3, 4, 5]));
    assert_eq!(agent.plan(now), []);
    agent.hear(Update::Gone(Kind::Services, object("one")));
    assert_eq!(removals(&agent.plan(now)), 1);
    agent.retry();
    assert_eq!(agent.plan(now), [], "places are used again only after a grace period");
    agent.retry();
    assert_eq!(leads(&agent.plan(now + Duration::from_secs(2))), [(2, 3)]);
}

/// Anyone may create a pod that asks for any host IP.
#[test]
fn a_pods_host_port_takes_no_services_address_and_marks_none() {
    let mut agent = agent(ROOMY);
    let pod: raw::Pod = serde_json::from_value(json!({
        "metadata": {"name": "greedy", "namespace": "default", "creationTimestamp": "2020-01-01T00:00:00Z"},
        "spec": {"nodeName": "n0", "containers": [{"ports": [
            {"containerPort": 1, "hostPort": 80, "hostIP": "10.96.0.1"},
            {"containerPort": 1, "hostPort": 1, "hostIP": "8.8.8.8"},
        ]}]},
        "status": {"phase": "Running", "podIP": "10.0.0.66"},
    }))
    .unwrap();
    agent.hear(Update::Pod(Box::new(pod)));
    agent.hear(service("web", 1));
    agent.hear(slice("web-1", "web", &[1]));
    agent.hear(listed(Kind::Services, &["web"]));
    agent.hear(listed(Kind::Slices, &["web-1"]));
    agent.hear(listed(Kind::Nodes, &["n0"]));
    agent.hear(listed(Kind::Pods, &["greedy"]));
    let ops = agent.plan(Instant::now());
    let last = ops.iter().rev().find_map(|op| match op {
        Op::Lead { frontend, lead } if frontend.port == 80 => Some(lead.flags),
        _ => None,
    });
    assert_eq!(last.unwrap() & ServiceValue::HOST_PORT, 0, "{ops:?}");
    let marked =
        |op: &Op| matches!(op, Op::Mark { address, .. } if address.to_string() == "8.8.8.8");
    assert!(!ops.iter().any(marked), "{ops:?}");
}

#[test]
fn pods_count_only_if_they_are_asked_for() {
    let node = Node { name: "n0".to_owned(), ..Node::default() };
    let planner = Planner::new(ROOMY);
    let mut agent = Agent::new(node, NodePortAddresses::Primary, kinds(false), planner);
    let pod: raw::Pod = serde_json::from_value(json!({
        "metadata": {"name": "pod", "namespace": "default"},
        "spec": {"nodeName": "n0", "containers": [{"ports": [{"containerPort": 1, "hostPort": 80}]}]},
        "status": {"podIP": "10.0.0.66"},
    }))
    .unwrap();
    agent.hear(Update::Pod(Box::new(pod)));
    list_all(&mut agent, &[], &[]);
    assert_eq!(agent.plan(Instant::now()), []);
}

/// Not all of a large cluster is planned at once, and none of it is left out.
#[test]
fn empty_tables_are_filled_part_by_part() {
    const MANY: u32 = 1300;
    let mut agent = agent(Capacity { services: 4 * MANY, ..ROOMY });
    let names: Vec<String> = (0..MANY).map(|number| format!("s{number}")).collect();
    for (number, name) in (0..).zip(&names) {
        let vip = std::net::Ipv4Addr::from_bits(0x0a60_0000 + number);
        let service = json!({
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"clusterIP": vip, "ports": [{"port": 80}]},
        });
        agent.hear(Update::Service(Box::new(serde_json::from_value(service).unwrap())));
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    list_all(&mut agent, &names, &[]);
    let now = Instant::now();
    let mut parts = Vec::new();
    while parts.is_empty() || agent.is_filling() {
        parts.push(leads(&agent.plan(now)).len());
    }
    assert!(parts.len() > 2 && parts.iter().all(|part| *part < 600), "{parts:?}");
    assert_eq!(parts.into_iter().sum::<usize>(), MANY as usize);
    assert_eq!(agent.plan(now), []);
}
