//! The golden cases of `golden/desired.yaml`: objects in, tables out.

use std::net::SocketAddr;

use portal::desired::{Backend, Port, PortId, desired};
use portal::model::from_k8s::{self, Problem};
use portal::model::{Cluster, Node, ObjectName, Protocol};
use portal::watch::raw;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Case {
    name: String,
    #[serde(default)]
    services: Vec<Value>,
    #[serde(default)]
    slices: Vec<Value>,
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
    let tables = desired(&cluster, &Node { name: "n0".to_owned() });
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
        cluster.set_slice(&name, from_k8s::slice(&raw, problems));
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
    let frontends: Vec<String> =
        port.frontends.iter().map(|f| SocketAddr::new(f.vip, f.port).to_string()).collect();
    let backends: Vec<String> = port.backends.iter().map(backend).collect();
    let backends = if backends.is_empty() { "nothing".to_owned() } else { backends.join(", ") };
    format!("{}/{protocol} {} -> {backends}", id.port, frontends.join(", "))
}

fn backend(backend: &Backend) -> String {
    let flags = [
        (backend.local, " +local"),
        (!backend.usable, " +draining"),
        (backend.usable && !backend.serving, " +dead"),
    ];
    let flags = flags.iter().filter(|(set, _)| *set).map(|(_, flag)| *flag);
    flags.fold(backend.address.to_string(), |text, flag| text + flag)
}
