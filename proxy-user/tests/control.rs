//! Agents as processes, against an API server that behaves and one that does not, and the command
//! line. What they make of it is read from the kernel's maps.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use portal::testing::agent::{self, Agent, http, http_status, provide_api};
use portal::testing::apiserver::{ApiServer, Faults};
use portal::testing::world::{BPFFS, Cni, Node, World};
use portal::testing::{eventually, objects};
use proxy_common::tables::{ServiceKey, ServiceValue};
use proxy_common::{Port, V4, proto};
use serde_json::{Value, json};

/// One node with an agent, and no pods.
struct Control {
    agent: Option<Agent>,
    api: ApiServer,
    world: World,
}

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_portal"))
}

impl Control {
    /// A node and an API server, no agent yet.
    fn new() -> Self {
        let (world, api) = (World::new(Cni::Bridge), ApiServer::new());
        provide_api(&world.nodes[0], &api);
        api.put(objects::node("n0", &[]));
        Self { agent: None, api, world }
    }

    fn start() -> Self {
        let mut control = Self::new();
        control.launch(&["--kubeconfig", "/mnt/kubeconfig"]);
        control.wait_ready();
        control
    }

    fn launch(&mut self, arguments: &[&str]) {
        self.agent = Some(Agent::start_with(self.node(), program(), arguments));
    }

    fn wait_ready(&mut self) {
        self.agent.as_mut().unwrap().wait_ready(&self.world.nodes[0]);
    }

    fn node(&self) -> &Node {
        &self.world.nodes[0]
    }

    fn portal(&self, arguments: &[&str]) -> Output {
        agent::portal(self.node(), program(), arguments)
    }

    /// The backends of each Service port, as `name: endpoint, ...`.
    fn served(&self) -> Vec<String> {
        let list = |command: &str| -> Vec<Value> {
            let output = self.portal(&[command, "-o", "json"]);
            serde_json::from_slice(&output.stdout).unwrap_or_default()
        };
        let backends = list("backends");
        let services = list("services");
        let line = |service: &Value| {
            let name = service["name"].as_str().unwrap();
            let of_it = backends.iter().filter(|backend| backend["name"] == name);
            let addresses: Vec<&str> = of_it.map(|b| b["backend"].as_str().unwrap()).collect();
            format!("{name}: {}", addresses.join(", "))
        };
        services.iter().map(line).collect()
    }

    fn wait_served(&self, wanted: &[&str]) {
        let mut last = Vec::new();
        let reached = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually("the kernel serves it", || {
                last = self.served();
                (last == wanted).then_some(())
            });
        }));
        let log = self.agent.as_ref().map(Agent::log).unwrap_or_default();
        assert!(reached.is_ok(), "wanted {wanted:?}, served {last:?}; the agent said:\n{log}");
    }

    /// Puts a Service with one TCP port and, with an endpoint, its slice.
    fn put(&self, name: &str, vip: u8, endpoint: Option<u8>) {
        let vip = format!("10.96.0.{vip}").parse().unwrap();
        self.api.put(objects::service(name, &[vip], &[("http", "TCP", 80)]));
        if let Some(host) = endpoint {
            self.api.put(slice(name, host));
        }
    }
}

fn slice(service: &str, host: u8) -> Value {
    let address = format!("10.244.0.{host}").parse().unwrap();
    objects::slice(service, service, &[("http", "TCP", 8080)], &[objects::endpoint(address, "n0")])
}

fn service(name: &str, vip: u8) -> Value {
    objects::service(name, &[format!("10.96.0.{vip}").parse().unwrap()], &[("http", "TCP", 80)])
}

#[test]
fn kp_3_the_label_of_another_proxy_takes_a_service_away_and_gives_it_back() {
    let control = Control::start();
    let labelled = |mut object: Value| {
        object["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": "other"});
        object
    };
    control.api.put(labelled(service("never", 1)));
    control.put("web", 2, Some(1));
    control.wait_served(&["web: 10.244.0.1:8080"]);
    control.api.put(labelled(service("web", 2)));
    control.wait_served(&[]);
    control.put("web", 2, None);
    control.wait_served(&["web: 10.244.0.1:8080"]);
}

#[test]
fn kp_6_the_headless_label_takes_a_slice_away() {
    let control = Control::start();
    control.put("web", 1, Some(1));
    control.wait_served(&["web: 10.244.0.1:8080"]);
    let mut headless = slice("web", 1);
    headless["metadata"]["labels"]["service.kubernetes.io/headless"] = "".into();
    control.api.put(headless);
    control.wait_served(&["web: "]);
}

#[test]
fn kp_5_a_service_may_become_an_external_name_and_come_back() {
    let control = Control::start();
    control.put("web", 1, Some(1));
    control.wait_served(&["web: 10.244.0.1:8080"]);
    let mut external = service("web", 1);
    external["spec"] = json!({"type": "ExternalName", "externalName": "example.org"});
    control.api.put(external);
    control.wait_served(&[]);
    control.put("web", 1, None);
    control.wait_served(&["web: 10.244.0.1:8080"]);
    control.api.delete("Service", "web");
    control.wait_served(&[]);
}

#[test]
fn watches_that_break_off_go_on_where_they_were() {
    let control = Control::start();
    for round in 1..4 {
        control.api.cut();
        control.put(&format!("web{round}"), round, Some(round));
    }
    let wanted = [1, 2, 3].map(|n| format!("web{n}: 10.244.0.{n}:8080"));
    control.wait_served(&wanted.each_ref().map(String::as_str));
}

#[test]
fn kp_134_what_was_deleted_during_an_outage_is_gone_after_it() {
    let control = Control::start();
    control.put("stays", 1, Some(1));
    control.put("goes", 2, Some(2));
    control.wait_served(&["goes: 10.244.0.2:8080", "stays: 10.244.0.1:8080"]);
    control.api.misbehave(Faults { refuse: Some(503), ..Faults::default() });
    control.api.cut();
    control.api.delete("Service", "goes");
    control.put("comes", 3, Some(3));
    // The server has forgotten what happened: watches that go on get 410.
    control.api.compact();
    eventually("the agent says what is wrong", || {
        control.agent.as_ref().unwrap().log().contains("trying again").then_some(())
    });
    assert_eq!(http_status(control.node(), 10256, "/healthz"), Some(200));
    control.api.misbehave(Faults::default());
    control.wait_served(&["comes: 10.244.0.3:8080", "stays: 10.244.0.1:8080"]);
}

#[test]
fn kp_135_an_agent_that_starts_during_an_outage_leaves_the_kernel_alone_and_waits() {
    let mut control = Control::start();
    control.put("web", 1, Some(1));
    control.wait_served(&["web: 10.244.0.1:8080"]);
    drop(control.agent.take());
    control.api.misbehave(Faults { refuse: Some(500), ..Faults::default() });
    control.api.cut();
    control.launch(&["--kubeconfig", "/mnt/kubeconfig"]);
    eventually("the agent serves its health", || {
        (http_status(control.node(), 10256, "/healthz") == Some(503)).then_some(())
    });
    assert_eq!(http_status(control.node(), 10256, "/livez"), Some(200));
    assert_eq!(control.served(), ["web: 10.244.0.1:8080"]);
    control.api.delete("Service", "web");
    control.api.misbehave(Faults::default());
    control.wait_ready();
    control.wait_served(&[]);
}

#[test]
fn a_server_without_streamed_lists_is_asked_for_pages() {
    let mut control = Control::new();
    control.api.misbehave(Faults { no_streamed_lists: true, ..Faults::default() });
    // More than a page.
    for number in 0..501_u16 {
        let vip = format!("10.97.{}.{}", number >> 8, number & 0xff).parse().unwrap();
        control.api.put(objects::service(&format!("s{number:03}"), &[vip], &[("", "TCP", 80)]));
    }
    control.launch(&["--kubeconfig", "/mnt/kubeconfig"]);
    control.wait_ready();
    eventually("all Services are served", || (control.served().len() == 501).then_some(()));
    control.api.delete("Service", "s000");
    eventually("one is gone", || (control.served().len() == 500).then_some(()));
}

#[test]
fn watches_that_are_always_gone_still_follow_by_lists() {
    let control = Control::start();
    control.api.misbehave(Faults { gone_on_watch: true, ..Faults::default() });
    control.api.cut();
    control.put("web", 1, Some(1));
    control.wait_served(&["web: 10.244.0.1:8080"]);
    control.api.cut();
    control.api.delete("Service", "web");
    control.wait_served(&[]);
}

#[test]
fn a_malformed_object_is_reported_once_by_its_name_and_stops_no_other() {
    let control = Control::start();
    let mut broken = service("broken", 1);
    broken["spec"]["clusterIPs"] = json!(["10.96.0.999"]);
    broken["spec"]["ports"] = json!([{"name": "a", "port": 0}, "nonsense"]);
    let mut stray = slice("stray", 1);
    stray["metadata"]["labels"] = json!({});
    control.api.put(broken.clone());
    control.api.put(stray);
    control.put("web", 2, Some(2));
    control.wait_served(&["web: 10.244.0.2:8080"]);
    // Seen again without a change, it is not said again.
    broken["metadata"]["annotations"] = json!({"touched": "yes"});
    control.api.put(broken);
    control.put("other", 3, Some(3));
    control.wait_served(&["other: 10.244.0.3:8080", "web: 10.244.0.2:8080"]);
    let log = control.agent.as_ref().unwrap().log();
    for (text, times) in [
        ("Service default/broken: cluster IP \"10.96.0.999\" is no IP address", 1),
        ("EndpointSlice default/stray: it has no label kubernetes.io/service-name", 1),
    ] {
        assert_eq!(log.matches(text).count(), times, "{text}, in:\n{log}");
    }
}

#[test]
fn two_services_that_claim_one_vip_are_told_and_the_older_has_it() {
    let control = Control::start();
    let aged = |mut object: Value, created: &str| {
        object["metadata"]["creationTimestamp"] = created.into();
        object
    };
    control.api.put(aged(service("young", 1), "2026-02-02T00:00:00Z"));
    control.api.put(slice("young", 1));
    control.wait_served(&["young: 10.244.0.1:8080"]);
    control.api.put(slice("old", 2));
    control.api.put(aged(service("old", 1), "2026-01-01T00:00:00Z"));
    control.wait_served(&["old: 10.244.0.2:8080"]);
    // Its owner is told, and no one else.
    let event = eventually("an Event says so", || {
        control.api.events().into_iter().find(|event| event["reason"] == "AddressTaken")
    });
    assert_eq!((&event["regarding"]["name"], &event["type"]), (&"young".into(), &"Warning".into()));
    assert_eq!(event["regarding"]["uid"], "service-young");
    let note = event["note"].as_str().unwrap();
    assert!(note.contains("10.96.0.1:80 belongs to the older Service default/old"), "{note}");
    control.api.delete("Service", "old");
    control.wait_served(&["young: 10.244.0.1:8080"]);
}

#[test]
fn a_folder_of_manifests_is_followed_live() {
    let mut control = Control::new();
    let folder = "/mnt/manifests";
    let write = |control: &Control, name: &str, text: &str| {
        control.node().mounts.run(|| fs::write(format!("{folder}/{name}"), text).unwrap());
    };
    let yaml = |value: &Value| serde_saphyr::to_string(value).unwrap();
    control.node().mounts.run(|| fs::create_dir(folder).unwrap());
    let both = format!(
        "# a comment\n---\n{}\n--- # more\n{}",
        yaml(&service("web", 1)),
        yaml(&slice("web", 1))
    );
    write(&control, "web.yaml", &both);
    write(&control, "ignored.txt", "kind: Service");
    control.launch(&["--manifests", folder]);
    control.wait_ready();
    control.wait_served(&["web: 10.244.0.1:8080"]);

    let list = json!({"kind": "List", "items": [service("more", 2), slice("more", 2)]});
    write(&control, "list.yaml", &yaml(&list));
    control.wait_served(&["more: 10.244.0.2:8080", "web: 10.244.0.1:8080"]);
    // What an API server would refuse is told once, and what can be read counts.
    let mut sloppy = slice("more", 2);
    sloppy["endpoints"][0]["conditions"]["serving"] = "yes".into();
    let list = json!({"kind": "List", "items": [service("more", 2), sloppy]});
    write(&control, "list.yaml", &yaml(&list));
    let agent = control.agent.as_ref().unwrap();
    eventually("the wrong type is told", || {
        let log = agent.log();
        log.contains("endpoints[0].conditions.serving: invalid type").then_some(())
    });
    control.wait_served(&["more: 10.244.0.2:8080", "web: 10.244.0.1:8080"]);
    // Half-written YAML deletes nothing.
    write(&control, "list.yaml", "kind: [unfinished");
    write(
        &control,
        "web.yaml",
        &format!("{}\n---\n{}", yaml(&service("web", 1)), yaml(&slice("web", 3))),
    );
    control.wait_served(&["more: 10.244.0.2:8080", "web: 10.244.0.3:8080"]);
    control.node().mounts.run(|| fs::remove_file(format!("{folder}/list.yaml")).unwrap());
    control.wait_served(&["web: 10.244.0.3:8080"]);
}

#[test]
fn what_is_missing_is_said_with_exit_code_1() {
    let mut control = Control::start();
    let place = format!("{BPFFS}/portal");
    let cgroup = control.node().cgroup.display().to_string();
    let good = ["run", "--manifests", "/mnt", "--bpffs-root", &place, "--cgroup-root", &cgroup];
    let failure = |control: &Control, arguments: &[&str]| {
        let output =
            agent::command(control.node(), program(), false).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let replaced = |position: usize, value: &'static str| {
        let mut arguments = good.to_vec();
        arguments[position] = value;
        arguments
    };
    let told = failure(&control, &good);
    assert!(told.contains("another portal is running"), "{told}");
    drop(control.agent.take());
    for (arguments, words) in [
        (replaced(4, "/mnt/nowhere"), "mount -t bpf"),
        (replaced(6, "/mnt"), "cgroup2"),
        (replaced(2, "/mnt/none"), "/mnt/none"),
        (
            [good.as_slice(), &["--healthz-bind-address", "nonsense"]].concat(),
            "--healthz-bind-address",
        ),
    ] {
        let told = failure(&control, &arguments);
        assert!(told.contains(words), "{arguments:?}: {told}");
    }
    let told = failure(&control, &["services", "--bpffs-root", "/mnt/nowhere"]);
    assert!(told.contains("portal run"), "{told}");
}

/// A group of processes that may use no more than so many bytes of memory, their maps counted.
struct Limited(std::path::PathBuf);

impl Limited {
    fn new(bytes: u64) -> Self {
        let places =
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        let name = format!("portal-test-{}", std::process::id());
        let made = places.into_iter().find_map(|(root, limit)| {
            let group = Path::new(root).join(&name);
            fs::create_dir(&group).ok()?;
            let limited = fs::write(group.join(limit), bytes.to_string());
            limited.inspect_err(|_| drop(fs::remove_dir(&group))).ok()?;
            Some(Self(group))
        });
        made.expect("a cgroup with a limit on memory")
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_memory_limit_too_small_is_named_as_such_with_what_would_do() {
    let control = Control::new();
    let limited = Limited::new(100 << 20);
    let cgroup = control.node().cgroup.display();
    let script = format!(
        "echo $$ > {}/cgroup.procs && exec {} run --manifests /mnt --bpffs-root {BPFFS}/portal \
         --cgroup-root {cgroup}",
        limited.0.display(),
        program().display()
    );
    let shell = |script: &str| {
        let mut shell = agent::command(control.node(), Path::new("/bin/sh"), false);
        shell.args(["-c", script]).output().unwrap()
    };
    let output = shell(&script);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("memory limit") && told.contains("--table-size=small"), "{told}");
    assert!(!told.contains("5.10"), "{told}");
}

/// Ten thousand Services of ten endpoints each.
fn fill_cluster(server: &ApiServer) {
    for number in 0..10_000_u32 {
        let name = format!("s{number}");
        let vip = Ipv4Addr::from_bits(0x0a60_0000 + number).into();
        server.put(objects::service(&name, &[vip], &[("http", "TCP", 80)]));
        let pods = (0..10).map(|pod| Ipv4Addr::from_bits(0x0b00_0000 + 10 * number + pod));
        let endpoints: Vec<Value> = pods
            .map(|pod| objects::endpoint(pod.into(), &format!("node-{}", pod.octets()[3])))
            .collect();
        let ports = [("http", "TCP", 8080)];
        server.put(objects::slice(&format!("{name}-1"), &name, &ports, &endpoints));
    }
}

#[test]
fn ten_thousand_services_of_ten_endpoints_take_less_than_80_megabytes() {
    let mut control = Control::new();
    fill_cluster(&control.api);
    control.launch(&["--kubeconfig", "/mnt/kubeconfig"]);
    let agent = control.agent.as_mut().unwrap();
    agent.wait_ready_within(Duration::from_mins(3), &control.world.nodes[0]);
    let agent = control.agent.as_ref().unwrap();
    // What of it is the program itself depends on how it was built.
    let program = agent.memory("RssFile");
    let (peak, after) = (agent.memory("VmHWM"), agent.memory("VmRSS"));
    println!("{peak} bytes at most, {after} afterwards, {program} of them mapped files");
    let metrics = http(control.node(), 10249, "/metrics").unwrap();
    assert!(metrics.contains("portal_table_used{table=\"backends_v4\"} 100000"), "{metrics}");
    assert!(peak - program < 72_000_000, "{peak} bytes at most, {program} of them mapped files");
}

/// Fills a table with what is none of Portal's, so that the kernel takes no more.
fn fill_services(node: &Node) {
    node.mounts.run(|| {
        let map = MapData::from_pin(Path::new(BPFFS).join("portal/maps/services_v4")).unwrap();
        let mut table = HashMap::<_, ServiceKey<V4>, ServiceValue>::try_from(Map::HashMap(map));
        let table = table.as_mut().unwrap();
        let strange: ServiceValue = bytemuck::Zeroable::zeroed();
        let mut keys = (0..u32::MAX).map(|number| {
            let vip = Ipv4Addr::from_bits(0xf000_0000 | number);
            ServiceKey::new(vip.into(), Port::new(1), proto::TCP)
        });
        assert!(keys.any(|key| table.insert(key, strange, 0).is_err()));
    });
}

#[test]
fn a_refused_write_is_told_and_written_again_and_ends_no_agent() {
    let mut control = Control::new();
    control.launch(&["--kubeconfig", "/mnt/kubeconfig", "--table-size", "small"]);
    control.wait_ready();
    control.put("web", 1, Some(1));
    control.wait_served(&["web: 10.244.0.1:8080"]);
    fill_services(control.node());
    control.put("late", 2, Some(2));
    eventually("it is told", || {
        let log = control.agent.as_ref().unwrap().log();
        log.contains("the kernel refused a write").then_some(())
    });
    // What fills the table leads nowhere, and is removed when the maps are read back.
    control.wait_served(&["late: 10.244.0.2:8080", "web: 10.244.0.1:8080"]);
    let metrics = http(control.node(), 10249, "/metrics").unwrap();
    assert!(!metrics.contains("portal_refused_writes_total 0"), "{metrics}");
    let log = control.agent.as_ref().unwrap().log();
    assert!(log.contains("the kernel takes writes again"), "{log}");
}

#[test]
fn listings_have_kubectls_habits_and_need_no_agent() {
    let mut control = Control::start();
    control.put("web", 1, Some(1));
    control.wait_served(&["web: 10.244.0.1:8080"]);
    let status = control.agent.take().unwrap().terminate();
    assert!(status.success(), "SIGTERM is no failure: {status}");
    let text = |arguments: &[&str]| {
        let output = control.portal(arguments);
        assert!(output.status.success(), "{arguments:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let table = text(&["services"]);
    assert!(table.starts_with("NAMESPACE") && table.contains("10.96.0.1"), "{table}");
    assert!(!table.contains("SLOTS") && text(&["services", "-o", "wide"]).contains("SLOTS"));
    assert!(text(&["backends", "-n", "default", "-o", "yaml"]).contains("10.244.0.1:8080"));
    assert_eq!(text(&["backends", "-n", "other"]).trim(), "No resources found.");
    assert_eq!(text(&["flows", "-o", "json"]).trim(), "[]");
    assert!(text(&["cleanup"]).is_empty() && control.node().pins("").is_empty());
}

#[test]
fn health_and_metrics_are_where_kube_proxys_are() {
    let control = Control::start();
    control.put("web", 1, None);
    control.wait_served(&["web: "]);
    let node = control.node();
    let metrics = http(node, 10249, "/metrics").unwrap();
    for line in
        ["portal_services 1", "portal_ready 1", "portal_outcomes_total{outcome=\"opened\"} 0"]
    {
        assert!(metrics.contains(line), "no {line} in {metrics}");
    }
    assert!(http(node, 10249, "/proxyMode").unwrap().ends_with("portal"));
    // Not for everyone who may ask for health.
    assert_eq!(http_status(node, 10256, "/metrics"), Some(404));
    // KP-123.
    let answer = http(node, 10249, "/configz").unwrap();
    let config: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    let config = &config["kubeproxy.config.k8s.io"];
    assert_eq!((&config["hostnameOverride"], &config["mode"]), (&"n0".into(), &"portal".into()));
    assert_eq!(config["detectLocalMode"], "ClusterCIDR");
    let health = || {
        let answer = http(node, 10256, "/healthz").unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.to_lowercase().contains("content-type: application/json"), "{head}");
        serde_json::from_str::<Value>(body).unwrap()
    };
    assert_eq!(health()["nodeEligible"], true);
    assert_eq!(health()["status"]["IPv6"]["healthy"], true);
    // KP-118: a node that is about to be removed drains, but the agent lives.
    let mut leaving = objects::node("n0", &[]);
    leaving["spec"]["taints"] =
        json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
    control.api.put(leaving);
    eventually("the node is not eligible", || {
        (http_status(node, 10256, "/healthz") == Some(503)).then_some(())
    });
    assert_eq!((&health()["nodeEligible"], &health()["healthy"]), (&false.into(), &true.into()));
    assert_eq!(http_status(node, 10256, "/livez"), Some(200));
    assert_eq!(http_status(node, 10256, "/nowhere"), Some(404));
}

#[test]
fn kp_107_and_151_events_tell_of_the_start_and_of_a_health_check_that_cant_be_served() {
    let control = Control::start();
    let event = |reason: &str| {
        eventually(reason, || control.api.events().into_iter().find(|e| e["reason"] == reason))
    };
    let started = event("Starting");
    assert_eq!(started["regarding"]["kind"], "Node");
    assert_eq!((&started["regarding"]["name"], &started["type"]), (&"n0".into(), &"Normal".into()));
    assert_eq!(started["reportingController"], "portal");
    let taken =
        control.node().namespace.run(|| std::net::TcpListener::bind("0.0.0.0:32123")).unwrap();
    let mut service = service("web", 1);
    service["spec"]["type"] = "LoadBalancer".into();
    service["spec"]["externalTrafficPolicy"] = "Local".into();
    service["spec"]["healthCheckNodePort"] = 32_123.into();
    control.api.put(service);
    let failed = event("FailedToStartServiceHealthcheck");
    assert_eq!(
        (&failed["regarding"]["name"], &failed["action"]),
        (&"web".into(), &"Listen".into())
    );
    let note = failed["note"].as_str().unwrap();
    assert!(
        note.starts_with("node n0 failed to start healthcheck \"default/web\" on port 32123: ")
    );
    drop(taken);
}
