//! What stands beside the code must fit it: the table of conformance, and the manifests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use portal::watch::strict::unknown_fields;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The heading in docs/conformance.md behind which nodes as people have them are listed.
const WORLDS: &str = "\n## Worlds\n";

/// The rows of tables, as cells, but for headings.
fn rows_of(text: &str) -> Vec<Vec<String>> {
    let is_heading = |line: &str| ["| KP", "| world"].iter().any(|start| line.starts_with(start));
    let rows = text.lines().filter(|line| line.starts_with("| ") && !is_heading(line));
    rows.map(|row| row.split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

/// The rows of docs/conformance.md on what kube-proxy does.
fn rows() -> Vec<Vec<String>> {
    rows_of(read("docs/conformance.md").split(WORLDS).next().unwrap())
}

#[test]
fn every_row_of_kube_proxys_behaviour_is_judged() {
    let rows = rows();
    let numbers: Vec<usize> = rows.iter().map(|row| row[1].parse().unwrap()).collect();
    assert_eq!(numbers, (1..=154).collect::<Vec<_>>());
    for row in rows {
        let (number, state, how) = (&row[1], row[3].as_str(), &row[4]);
        match state {
            "to come" => {}
            "done" | "partly" | "differs" | "n/a" => assert!(!how.is_empty(), "KP-{number}: how?"),
            other => panic!("KP-{number}: {other}"),
        }
    }
}

#[test]
fn every_test_that_the_table_names_is_there() {
    let files = [
        "agent",
        "control",
        "desired",
        "doors",
        "firewalls",
        "flows",
        "kernel",
        "load",
        "matrix",
        "network",
        "plan",
        "scenarios",
        "worlds",
    ];
    let sources: String = files.map(|name| read(&format!("proxy-user/tests/{name}.rs"))).concat()
        + &read("proxy-ebpf/tests/datapath/life.rs")
        + &read("proxy-ebpf/tests/datapath/algorithms.rs")
        + &read("proxy-ebpf/tests/datapath/masquerade.rs")
        + &read("proxy-user/src/http.rs")
        + &read("proxy-user/src/desired/node_ports.rs")
        + &read("proxy-user/src/links.rs");
    let worlds = rows_of(read("docs/conformance.md").split(WORLDS).nth(1).unwrap());
    assert!(worlds.len() >= 10, "only {} worlds were read", worlds.len());
    for world in &worlds {
        let name = world[3].trim_matches('`');
        assert!(sources.contains(&format!("fn {name}()")), "{}: no test {name}", world[1]);
    }
    for row in rows() {
        let quoted = row[4].split('`').skip(1).step_by(2);
        for name in quoted.filter(|name| name.contains('_') && !name.contains(['/', '-', '.'])) {
            let start = name.trim_end_matches('…');
            assert!(sources.contains(&format!("fn {start}")), "KP-{}: no test {name}", row[1]);
        }
    }
}

/// The object that a manifest's document is, without a field that the API does not know.
fn object<T: DeserializeOwned + Serialize>(document: &str) -> T {
    let given: Value = serde_saphyr::from_str(document).unwrap();
    let object: T = serde_json::from_value(given.clone()).unwrap();
    let unknown = unknown_fields(&given, &serde_json::to_value(&object).unwrap());
    assert_eq!(unknown, [""; 0]);
    object
}

#[test]
fn the_manifests_are_objects_of_the_api() {
    let rbac = read("deploy/rbac.yaml");
    let documents: Vec<&str> = rbac.split("\n---\n").collect();
    let [account, role, binding] = documents.as_slice() else { panic!("three documents") };
    let account: ServiceAccount = object(account);
    let role: ClusterRole = object(role);
    let binding: ClusterRoleBinding = object(binding);
    assert_eq!(binding.role_ref.name, role.metadata.name.unwrap());
    assert_eq!(Some(&binding.subjects.unwrap()[0].name), account.metadata.name.as_ref());
    let kinds: Vec<String> = role
        .rules
        .unwrap()
        .into_iter()
        .flat_map(|rule| rule.resources.unwrap_or_default())
        .collect();
    for kind in ["services", "endpointslices", "nodes", "pods"] {
        assert!(kinds.iter().any(|allowed| allowed == kind), "{kind} may not be watched");
    }
}

#[test]
fn the_daemon_sets_arguments_are_flags_of_portal() {
    let set: DaemonSet = object(&read("deploy/daemonset.yaml"));
    let pod = set.spec.unwrap().template.spec.unwrap();
    let container = &pod.containers[0];
    let arguments = container.args.as_ref().unwrap();
    let mut portal = Command::new(env!("CARGO_BIN_EXE_portal"));
    let output = portal.args(arguments).arg("--help").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let volumes: Vec<String> = pod.volumes.unwrap().into_iter().map(|volume| volume.name).collect();
    let mounts = container.volume_mounts.as_ref().unwrap();
    assert!(mounts.iter().all(|mount| volumes.contains(&mount.name)));
}
