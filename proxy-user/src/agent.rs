//! The agent's state between an update heard and the writes it causes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use ipnet::IpNet;
use proxy_common::tables::ServiceValue;

use crate::desired::health::{HealthCheck, health_check};
use crate::desired::node_ports::{NodePortAddresses, is_eligible};
use crate::desired::{Patch, PortId, desired_of, patch_of};
use crate::events::Notice;
use crate::model::from_k8s::{self, Problem};
use crate::model::{Cluster, Concerned, Node, ObjectName, Owner};
use crate::plan::{Change, Op, Planner, Refusal, Use};
use crate::watch::{Kind, Update};

/// How many objects are planned at once while empty tables are filled.
const AT_ONCE: usize = 512;

/// Where a node's own sockets reach its host ports too.
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// How much of an object is to be planned anew.
enum Scope {
    /// All of it.
    Whole,
    /// Its endpoints at some addresses.
    Endpoints(BTreeSet<IpAddr>),
}

/// How far the kernel is in step with the cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// Nothing was planned.
    Waiting,
    /// Empty tables are being filled, part by part.
    Filling,
    /// What changes is planned.
    Following,
}

/// Everything between the watches and the kernel, without I/O but for the log.
pub struct Agent {
    cluster: Cluster,
    node: Node,
    node_ports: NodePortAddresses,
    /// The kinds that must be listed before anything is written.
    kinds: Vec<Kind>,
    /// The node's own addresses, once netlink has told of them.
    addresses: Option<BTreeSet<IpAddr>>,
    /// What load balancers are told, by Service.
    checks: BTreeMap<ObjectName, HealthCheck>,
    checks_changed: bool,
    /// The node or its addresses have changed.
    node_changed: bool,
    planner: Planner,
    /// What to plan anew.
    dirty: BTreeMap<Owner, Scope>,
    listed: HashSet<Kind>,
    progress: Progress,
    /// The ports of each object as last wanted.
    planned: HashMap<Owner, Box<[PortId]>>,
    /// What was said of each object, so that it is said once.
    reported: HashMap<(&'static str, ObjectName), Vec<Problem>>,
    /// What can't be done, so that it is said once and tried again.
    refused: HashMap<PortId, BTreeSet<String>>,
    /// How much was refused that was not before.
    new_refusals: usize,
    /// What objects' owners are to be told.
    notices: Vec<Notice>,
}

impl Agent {
    /// An agent of a node of which little is known yet, for what `planner` holds.
    /// `kinds` are what it hears of.
    pub fn new(
        node: Node,
        node_ports: NodePortAddresses,
        kinds: Vec<Kind>,
        planner: Planner,
    ) -> Self {
        Self {
            cluster: Cluster::default(),
            node,
            node_ports,
            kinds,
            addresses: None,
            checks: BTreeMap::new(),
            checks_changed: false,
            node_changed: true,
            planner,
            dirty: BTreeMap::new(),
            listed: HashSet::new(),
            progress: Progress::Waiting,
            planned: HashMap::new(),
            reported: HashMap::new(),
            refused: HashMap::new(),
            new_refusals: 0,
            notices: Vec::new(),
        }
    }

    /// Whether every kind was listed, so that the kernel follows the cluster (KP-126).
    pub fn is_ready(&self) -> bool {
        self.kinds.iter().all(|kind| self.listed.contains(kind))
    }

    /// How many Services there are.
    pub fn services(&self) -> usize {
        self.cluster.services()
    }

    /// Whether the next plan goes on with filling empty tables: not all Services are in force yet.
    pub fn is_filling(&self) -> bool {
        self.progress == Progress::Filling
    }

    /// Takes an update in.
    pub fn hear(&mut self, update: Update) {
        match update {
            Update::Service(raw) => {
                let name = ObjectName::new(&raw.metadata.namespace, &raw.metadata.name);
                let mut problems = Vec::new();
                let service = from_k8s::service(&raw, &mut problems);
                self.report("Service", &name, problems);
                if self.cluster.set_service(&name, service) {
                    self.enqueue(Owner::Service(name));
                }
            }
            // A folder of manifests may have pods that nobody asked for.
            Update::Pod(_) if !self.kinds.contains(&Kind::Pods) => {}
            Update::Pod(raw) => {
                let name = ObjectName::new(&raw.metadata.namespace, &raw.metadata.name);
                let mut problems = Vec::new();
                let pod = from_k8s::pod(&raw, &self.node.name, &mut problems);
                self.report("Pod", &name, problems);
                if self.cluster.set_pod(&name, pod) {
                    self.enqueue(Owner::Pod(name));
                }
            }
            Update::Slice(raw) => {
                let name = ObjectName::new(&raw.metadata.namespace, &raw.metadata.name);
                let mut problems = Vec::new();
                let slice = from_k8s::slice(&raw, &self.node.name, &mut problems);
                self.report("EndpointSlice", &name, problems);
                let concerned = self.cluster.set_slice(&name, slice);
                self.enqueue_endpoints(concerned);
            }
            Update::Node(raw) => self.set_node(from_k8s::node(&raw)),
            Update::Gone(kind, name) => self.forget(kind, &name),
            Update::Listed(kind, names) => self.keep_only(kind, &names),
        }
    }

    /// Takes in what the cluster says of this node: hints are judged by its zone (KP-69), source ranges
    /// and `NodePorts` by its addresses.
    fn set_node(&mut self, node: Node) {
        let Node { name, algorithm, .. } = &self.node;
        let node = Node { name: name.clone(), algorithm: *algorithm, ..node };
        if node != self.node {
            self.node = node;
            self.node_changed = true;
            self.enqueue_all();
        }
    }

    /// Takes in which addresses this node has.
    pub fn set_addresses(&mut self, addresses: BTreeSet<IpAddr>) {
        self.node_changed |= self.addresses.as_ref() != Some(&addresses);
        let concerned = self.cluster.set_own(&addresses);
        self.enqueue_endpoints(concerned);
        self.addresses = Some(addresses);
    }

    /// The writes that say where pods go without being masqueraded. They need nothing of the cluster, and
    /// come before any link is attached to.
    pub fn except_from_masquerade(&mut self, ranges: &BTreeSet<IpNet>) -> Vec<Op> {
        self.planner.plan_exceptions(ranges)
    }

    /// Goes on with what the maps hold, as if it had just been started: not all that was planned has come to
    /// be.
    pub fn start_over(&mut self, planner: Planner) {
        self.planner = planner;
        self.progress = Progress::Waiting;
        self.node_changed = true;
    }

    /// Whether load balancers may send to this node (KP-118).
    pub fn is_eligible(&self) -> bool {
        !self.node.leaving
    }

    /// What load balancers are told, for each Service that is checked, and at which addresses; if that
    /// has changed since the last call.
    pub fn changed_health_checks(&mut self) -> Option<(Vec<HealthCheck>, BTreeSet<IpAddr>)> {
        let addresses = self.node_ports.listen_at(self.addresses.as_ref(), &self.node);
        let checks = || self.checks.values().cloned().collect();
        std::mem::take(&mut self.checks_changed).then(|| (checks(), addresses))
    }

    /// Whether plans are still to come, though nothing has changed.
    pub fn is_settled(&self) -> bool {
        self.planner.is_settled() && !self.is_filling()
    }

    /// How much of each table is in use.
    pub fn usage(&self) -> Vec<Use> {
        self.planner.usage()
    }

    /// What a Service port is called, by its number.
    pub fn name_of(&self, id: u32) -> Option<String> {
        self.planner.name_of(id).map(ToString::to_string)
    }

    /// The addresses of all backends on other nodes that the kernel holds.
    pub fn remote_backends(&self) -> HashSet<IpAddr> {
        self.planner.remote_backends()
    }

    /// The `ClusterIPs` that the kernel holds, without those that are the node's own addresses too.
    pub fn cluster_ips(&self) -> BTreeSet<IpAddr> {
        self.planner.cluster_ips().collect()
    }

    /// Writes backends again as they are: another way leads to those addresses.
    pub fn rewrite(&self, is_concerned: impl Fn(IpAddr) -> bool) -> Vec<Op> {
        self.planner.rewrite(is_concerned)
    }

    fn enqueue(&mut self, owner: Owner) {
        self.dirty.insert(owner, Scope::Whole);
    }

    /// All that there is, beside what is gone and was not planned yet.
    fn enqueue_all(&mut self) {
        self.dirty.extend(self.cluster.owners().map(|owner| (owner, Scope::Whole)));
    }

    fn enqueue_endpoints(&mut self, concerned: Concerned) {
        // The first plan is of everything; until then no list of it is kept.
        if self.progress == Progress::Waiting {
            return;
        }
        for (service, addresses) in concerned {
            let owner = Owner::Service(service);
            match self.dirty.entry(owner).or_insert(Scope::Endpoints(BTreeSet::new())) {
                Scope::Whole => {}
                Scope::Endpoints(known) => known.extend(addresses),
            }
        }
    }

    fn forget(&mut self, kind: Kind, name: &ObjectName) {
        match kind {
            Kind::Services => {
                self.reported.remove(&("Service", name.clone()));
                if self.cluster.set_service(name, None) {
                    self.enqueue(Owner::Service(name.clone()));
                }
            }
            Kind::Slices => {
                self.reported.remove(&("EndpointSlice", name.clone()));
                let concerned = self.cluster.set_slice(name, None);
                self.enqueue_endpoints(concerned);
            }
            Kind::Pods => {
                self.reported.remove(&("Pod", name.clone()));
                if self.cluster.set_pod(name, None) {
                    self.enqueue(Owner::Pod(name.clone()));
                }
            }
            // KP-138: the last node known goes on to count.
            Kind::Nodes => {}
        }
    }

    fn keep_only(&mut self, kind: Kind, names: &HashSet<ObjectName>) {
        let known: Vec<ObjectName> = match kind {
            Kind::Services => self.cluster.service_names().cloned().collect(),
            Kind::Slices => self.cluster.slice_names().cloned().collect(),
            Kind::Pods => self.cluster.pod_names().cloned().collect(),
            Kind::Nodes => Vec::new(),
        };
        for name in known.iter().filter(|name| !names.contains(name)) {
            self.forget(kind, name);
        }
        if kind == Kind::Nodes && names.is_empty() {
            tracing::warn!(
                "the cluster has no Node \"{}\", so no endpoint counts as this node's; is \
                 --hostname-override right?",
                self.node.name
            );
        }
        self.listed.insert(kind);
    }

    fn report(&mut self, kind: &'static str, name: &ObjectName, problems: Vec<Problem>) {
        let key = (kind, name.clone());
        if problems.is_empty() {
            self.reported.remove(&key);
        } else if self.reported.get(&key) != Some(&problems) {
            for problem in &problems {
                tracing::warn!("{kind} {name}: {problem}");
            }
            self.reported.insert(key, problems);
        }
    }

    /// What objects' owners are to be told since the last call.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// A warning about a Service.
    pub fn warning(
        &self,
        name: &ObjectName,
        reason: &'static str,
        action: &'static str,
        note: String,
    ) -> Notice {
        let uid = self.cluster.service(name).map(|service| service.uid.clone());
        let (kind, name, uid) = ("Service", name.clone(), uid.unwrap_or_default());
        Notice { kind, name, uid, warns: true, reason, action, note }
    }

    /// Whether something was refused since the last call that was not before.
    pub fn has_new_refusals(&mut self) -> bool {
        std::mem::take(&mut self.new_refusals) > 0
    }

    /// Tries again what was refused, at the next plan: places may have become free.
    pub fn retry(&mut self) {
        if self.refused.is_empty() {
            return;
        }
        let is_refused = |ports: &[PortId]| ports.iter().any(|p| self.refused.contains_key(p));
        let owners = self.planned.iter().filter(|(_, ports)| is_refused(ports));
        self.dirty.extend(owners.map(|(owner, _)| (owner.clone(), Scope::Whole)));
    }

    /// The writes that make the kernel hold what it should. None before every kind was listed: until
    /// then what an earlier agent left stays in force.
    pub fn plan(&mut self, now: Instant) -> Vec<Op> {
        if !self.is_ready() {
            return Vec::new();
        }
        let mut ops = self.plan_node();
        let (mut changes, mut patches) = (Vec::new(), Vec::new());
        if self.progress == Progress::Waiting {
            self.start(&mut changes);
        }
        let at_once = if self.is_filling() { AT_ONCE } else { usize::MAX };
        for _ in 0..at_once {
            let Some((owner, scope)) = self.dirty.pop_first() else { break };
            match self.patches(&owner, &scope) {
                Some(these) => patches.extend(these),
                None => self.change(&owner, &mut changes),
            }
        }
        if self.dirty.is_empty() {
            self.progress = Progress::Following;
        }
        let mut refusals = Vec::new();
        ops.extend(self.planner.patch(now, &patches, &mut refusals));
        ops.extend(self.planner.plan(now, &changes, &mut refusals));
        self.report_refusals(&changes, refusals);
        ops
    }

    /// The marks of the node's own addresses.
    fn plan_node(&mut self) -> Vec<Op> {
        // Until they are known, what an earlier agent has marked stays.
        let Some(addresses) = self.addresses.as_ref().filter(|_| self.node_changed) else {
            return Vec::new();
        };
        self.node_changed = false;
        self.checks_changed = true;
        let node_ports = self.node_ports.select(addresses, &self.node);
        let own = addresses.iter().filter(|address| is_eligible(**address));
        let marks = own.map(|address| {
            let takes = if node_ports.contains(address) { ServiceValue::NODE_PORTS } else { 0 };
            (*address, ServiceValue::NODE | takes)
        });
        let mut marks: BTreeMap<IpAddr, u32> = marks.collect();
        if self.kinds.contains(&Kind::Pods) {
            marks.extend(LOOPBACK.map(|ip| (ip, ServiceValue::NODE | ServiceValue::LOOPBACK)));
        }
        self.planner.plan_node(&marks)
    }

    /// The first change: what is held and not wanted goes, and the rest is put. Into empty tables it is put part by
    /// part, so that not all of it is in memory at once; what is held already may pass from one to another, which
    /// one plan must see.
    fn start(&mut self, changes: &mut Vec<Change>) {
        self.progress = Progress::Filling;
        self.enqueue_all();
        if self.planner.ports().next().is_none() {
            return;
        }
        while let Some((owner, _)) = self.dirty.pop_first() {
            self.change(&owner, changes);
        }
        let wanted: HashSet<&PortId> = changes.iter().map(|(port, _)| port).collect();
        let gone = self.planner.ports().filter(|port| !wanted.contains(port));
        let gone: Vec<Change> = gone.map(|port| (port.clone(), None)).collect();
        changes.extend(gone);
    }

    /// What a change comes to that needs no look at the whole object; `None` if it does.
    fn patches(&mut self, owner: &Owner, scope: &Scope) -> Option<Vec<Patch>> {
        let (Owner::Service(name), Scope::Endpoints(addresses)) = (owner, scope) else {
            return None;
        };
        let patch = |port: &PortId| {
            let criteria = self.planner.criteria(port)?;
            patch_of(&self.cluster, &self.node, port, criteria, addresses)
        };
        let patches = self.planned.get(owner)?.iter().map(patch).collect::<Option<_>>()?;
        self.check(name);
        Some(patches)
    }

    fn change(&mut self, owner: &Owner, changes: &mut Vec<Change>) {
        if let Owner::Service(name) = owner {
            self.check(name);
        }
        let wanted = desired_of(&self.cluster, &self.node, owner);
        let before = self.planned.remove(owner).unwrap_or_default();
        let gone = before.into_iter().filter(|port| !wanted.contains_key(port));
        changes.extend(gone.map(|port| (port, None)));
        if !wanted.is_empty() {
            self.planned.insert(owner.clone(), wanted.keys().cloned().collect());
        }
        changes.extend(wanted.into_iter().map(|(port, tables)| (port, Some(tables))));
    }

    /// Notes what load balancers are told of a Service.
    fn check(&mut self, name: &ObjectName) {
        let check = health_check(&self.cluster, name);
        self.checks_changed |= self.checks.get(name) != check.as_ref();
        match check {
            Some(check) => self.checks.insert(name.clone(), check),
            None => self.checks.remove(name),
        };
    }

    /// Says what can't be done, once.
    fn report_refusals(&mut self, changes: &[Change], refusals: Vec<Refusal>) {
        let mut told: BTreeMap<PortId, (&'static str, BTreeSet<String>)> = BTreeMap::new();
        for refusal in refusals {
            let text = refusal.to_string();
            let (port, reason) = match refusal {
                Refusal::Full { port, .. } => (port, "TableFull"),
                Refusal::Taken { port, .. } => (port, "AddressTaken"),
            };
            told.entry(port).or_insert((reason, BTreeSet::new())).1.insert(text);
        }
        for (port, _) in changes.iter().filter(|(port, _)| !told.contains_key(port)) {
            self.refused.remove(port);
        }
        for (port, (reason, texts)) in told {
            let known = self.refused.get(&port).cloned().unwrap_or_default();
            let fresh: Vec<&str> = texts.difference(&known).map(String::as_str).collect();
            if !fresh.is_empty() {
                self.new_refusals += 1;
                fresh.iter().for_each(|text| tracing::warn!("{port}: {text}"));
                self.notices.extend(self.notice(&port, reason, &fresh.join("; ")));
            }
            self.refused.insert(port, texts);
        }
    }
}

impl Agent {
    /// A warning about the object that a port belongs to. Of a pod the maps know a shortened name only.
    fn notice(&self, port: &PortId, reason: &'static str, note: &str) -> Option<Notice> {
        let (action, note) = ("Serve", format!("node {}: {port}: {note}", self.node.name));
        if !port.is_host_port() {
            return Some(self.warning(&port.service, reason, action, note));
        }
        let name = port.service.clone();
        let uid = self.cluster.pod(&name)?.uid.clone();
        Some(Notice { kind: "Pod", name, uid, warns: true, reason, action, note })
    }
}
