//! The golden cases of `golden/desired.yaml`: objects in, tables out; and that what is planned of a change of a few
//! endpoints is what a look at all of them tells.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use portal::desired::{Access, Backend, Frontend, Port, PortId, desired, patch_of};
use portal::model::from_k8s::{self, Problem};
use portal::model::{
    Cluster, Endpoint, EndpointPort, Hints, IpFamily, Node, ObjectName, Protocol, Service, Slice,
};
use portal::watch::raw;
use proptest::prelude::*;
use proxy_common::tables::Algorithm;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Case {
    name: String,
    #[serde(default)]
    services: Vec<Value>,
    #[serde(default)]
    slices: Vec<Value>,
    #[serde(default)]
    pods: Vec<Value>,
    expect: Vec<String>,
    #[serde(default)]
    problems: Vec<String>,
}

#[test]
fn golden_cases() {
    let cases: Vec<Case> = serde_saphyr::from_str(include_str!("golden/desired.yaml")).unwrap();
    assert!(cases.len() > 25, "only {} cases were read", cases.len());
    let wrong: Vec<String> = cases.iter().filter_map(|case| judge(case).err()).collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn judge(case: &Case) -> Result<(), String> {
    let mut problems = Vec::new();
    let cluster = cluster(case, &mut problems);
    let name = "n0".to_owned();
    let addresses = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()].into();
    let zone = Some("here".to_owned());
    let node = Node { name, zone, addresses, ..Node::default() };
    let tables = desired(&cluster, &node);
    let mut lines: Vec<String> = tables.iter().map(|(id, port)| line(id, port)).collect();
    let mut expected = case.expect.clone();
    lines.sort();
    expected.sort();
    if lines != expected {
        return Err(format!("{}:\n  wanted {expected:#?}\n  got {lines:#?}", case.name));
    }
    let told = problems.len() == case.problems.len()
        && case.problems.iter().zip(&problems).all(|(part, problem)| problem.contains(part));
    if told {
        return Ok(());
    }
    Err(format!("{}:\n  wanted problems {:#?}\n  got {problems:#?}", case.name, case.problems))
}

fn cluster(case: &Case, problems: &mut Vec<Problem>) -> Cluster {
    let mut cluster = Cluster::default();
    for object in &case.services {
        let raw: raw::Service = serde_json::from_value(complete(object)).unwrap();
        let name = ObjectName::new(&raw.metadata.namespace, &raw.metadata.name);
        cluster.set_service(&name, from_k8s::service(&raw, problems));
    }
    for object in &case.slices {
        let mut object = complete(object);
        let address_type = object.get("addressType").cloned().unwrap_or_else(|| "IPv4".into());
        object["addressType"] = address_type;
        let labels = &mut object["metadata"]["labels"];
        if labels.is_null() {
            *labels = json!({"kubernetes.io/service-name": "web"});
        }
        let raw: raw::EndpointSlice = serde_json::from_value(object).unwrap();
        let name = ObjectName::new(&raw.metadata.namespace, &raw.metadata.name);
        cluster.set_slice(&name, from_k8s::slice(&raw, "n0", problems));
    }
    for object in &case.pods {
        let raw: raw::Pod = serde_json::from_value(complete(object)).unwrap();
        let name = ObjectName::new(&raw.metadata.namespace, &raw.metadata.name);
        cluster.set_pod(&name, from_k8s::pod(&raw, "n0", problems));
    }
    cluster
}

/// The object with a name and a namespace.
fn complete(object: &Value) -> Value {
    let mut object = object.clone();
    for (field, default) in [("name", "web"), ("namespace", "default")] {
        let value = &mut object["metadata"][field];
        if value.is_null() {
            *value = default.into();
        }
    }
    object
}

fn line(id: &PortId, port: &Port) -> String {
    let protocol = match id.protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
    };
    let frontends: Vec<String> = port.frontends.iter().map(frontend).collect();
    let backends: Vec<String> = port.backends.iter().map(backend).collect();
    let backends = if backends.is_empty() { "nothing".to_owned() } else { backends.join(", ") };
    let affinity = match port.affinity {
        0 => String::new(),
        seconds => format!(" for {seconds} s"),
    };
    let algorithm = match port.algorithm {
        Algorithm::Maglev => String::new(),
        other => format!(" by {}", other.label()),
    };
    let ranges: Vec<String> = port.source_ranges.iter().map(ToString::to_string).collect();
    let ranges =
        if ranges.is_empty() { String::new() } else { format!(" from {}", ranges.join(", ")) };
    format!(
        "{}/{protocol} {} -> {backends}{algorithm}{affinity}{ranges}",
        id.port,
        frontends.join(", ")
    )
}

fn flags(flags: &[(bool, &str)]) -> String {
    flags.iter().filter(|(set, _)| *set).map(|(_, flag)| *flag).collect()
}

fn frontend((frontend, access): (&Frontend, &Access)) -> String {
    let at = if frontend.vip.is_unspecified() {
        format!("node:{}", frontend.port)
    } else {
        SocketAddr::new(frontend.vip, frontend.port).to_string()
    };
    let told = flags(&[
        (!access.refuses && !access.host_port, " +external"),
        (access.host_port, " +host-port"),
        (access.local_for_all, " +local-for-all"),
        (access.local_for_outside, " +local-for-outside"),
        (access.source_ranges, " +ranges"),
        (access.node_allowed, " +node-allowed"),
    ]);
    at + &told
}

fn backend(backend: &Backend) -> String {
    let told = flags(&[
        (backend.local, " +local"),
        (!backend.usable && !backend.usable_local, " +unused"),
        (backend.usable && backend.local && !backend.usable_local, " +not-for-local"),
        (!backend.usable && backend.usable_local, " +only-for-local"),
        (backend.usable && !backend.serving, " +dead"),
    ]);
    let weight = match backend.weight {
        1 => String::new(),
        weight => format!(" x{weight}"),
    };
    backend.address.to_string() + &weight + &told
}

/// An endpoint in any condition; there are few addresses, so that some are there twice.
fn any_endpoint() -> impl Strategy<Value = Endpoint> {
    let zones = |here: bool| vec![if here { "here" } else { "there" }.to_owned()];
    let hints = proptest::option::weighted(0.7, any::<bool>().prop_map(zones));
    (1..8_u8, any::<[bool; 4]>(), 0..12_u16, hints).prop_map(
        |(host, [ready, serving, terminating, local], weight, zones)| Endpoint {
            address: IpAddr::from([10, 0, 0, host]),
            ready,
            serving,
            terminating,
            named_here: local,
            local,
            weight: weight.min(1),
            hints: zones.map(|zones| Box::new(Hints { zones, nodes: Vec::new() })),
        },
    )
}

fn any_slice() -> impl Strategy<Value = Slice> {
    let port = |name: &str, port| EndpointPort { name: name.into(), protocol: Protocol::Tcp, port };
    (any::<bool>(), proptest::collection::vec(any_endpoint(), 0..5)).prop_map(
        move |(has_another, endpoints)| Slice {
            service: ObjectName::new("default", "web"),
            family: IpFamily::V4,
            ports: vec![port("", 8080), port(if has_another { "" } else { "metrics" }, 9090)],
            endpoints,
        },
    )
}

fn web() -> (ObjectName, Option<Service>) {
    let raw = serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
    }));
    (ObjectName::new("default", "web"), from_k8s::service(&raw.unwrap(), &mut Vec::new()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// What a patch makes of the backends of before is what a look at all endpoints gives.
    #[test]
    fn a_patch_comes_to_what_a_look_at_all_tells(
        history in proptest::collection::vec((0..3_u8, proptest::option::weighted(0.8, any_slice())), 1..20)
    ) {
        let node = Node { zone: Some("here".to_owned()), ..Node::default() };
        let mut cluster = Cluster::default();
        let (web, service) = web();
        cluster.set_service(&web, service);
        for (number, slice) in history {
            let before = desired(&cluster, &node);
            let (id, before) = before.iter().next().unwrap();
            let name = ObjectName::new("default", &format!("web-{number}"));
            let concerned = cluster.set_slice(&name, slice);
            let after = desired(&cluster, &node).remove(id).unwrap();
            let none = BTreeSet::new();
            let addresses = concerned.first().map_or(&none, |(_, addresses)| addresses);
            match patch_of(&cluster, &node, id, before.criteria, addresses) {
                Some(patch) => {
                    let stay = before.backends.iter();
                    let mut patched: Vec<Backend> =
                        stay.filter(|b| !addresses.contains(&b.address.ip())).copied().collect();
                    patched.extend(&patch.backends);
                    patched.sort_unstable();
                    prop_assert_eq!(patched, after.backends);
                    prop_assert_eq!(before.criteria, after.criteria);
                }
                None => prop_assert!(
                    before.criteria != after.criteria
                        || cluster.repeats_addresses(&web)
                        || cluster.slices(&web).flat_map(|s| &s.endpoints).any(|e| e.weight == 0)
                ),
            }
        }
    }
}
