//! The golden cases of `golden/desired.yaml`: objects in, tables out.

use std::net::SocketAddr;

use portal::desired::{Access, Backend, Frontend, Port, PortId, desired};
use portal::model::from_k8s::{self, Problem};
use portal::model::{Cluster, Node, ObjectName, Protocol};
use portal::watch::raw;
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
