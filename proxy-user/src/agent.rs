//! The agent's state between an update heard and the writes it causes.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Instant;

use crate::desired::{PortId, desired, desired_service};
use crate::model::from_k8s::{self, Problem};
use crate::model::{Cluster, Node, ObjectName};
use crate::plan::{Op, Planner, Refusal};
use crate::watch::{KINDS, Kind, Update};

/// Everything between the watches and the kernel, without I/O but for the log.
pub struct Agent {
    cluster: Cluster,
    node: Node,
    planner: Planner,
    /// Services to plan anew.
    dirty: BTreeSet<ObjectName>,
    listed: HashSet<Kind>,
    started: bool,
    /// The Service ports of each Service as last wanted.
    planned: HashMap<ObjectName, BTreeSet<PortId>>,
    /// What was said of each object, so that it is said once.
    reported: HashMap<(&'static str, ObjectName), Vec<Problem>>,
    /// What can't be done, so that it is said once and tried again.
    refused: HashMap<PortId, String>,
}

impl Agent {
    /// An agent of the node of that name, for what `planner` holds.
    pub fn new(node: &str, planner: Planner) -> Self {
        Self {
            cluster: Cluster::default(),
            node: Node { name: node.to_owned() },
            planner,
            dirty: BTreeSet::new(),
            listed: HashSet::new(),
            started: false,
            planned: HashMap::new(),
            reported: HashMap::new(),
            refused: HashMap::new(),
        }
    }

    /// Whether every kind was listed, so that the kernel follows the cluster (KP-126).
    pub fn is_ready(&self) -> bool {
        KINDS.iter().all(|kind| self.listed.contains(kind))
    }

    /// How many Services there are.
    pub fn services(&self) -> usize {
        self.cluster.service_names().count()
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
                    self.dirty.insert(name);
                }
            }
            Update::Slice(raw) => {
                let name = ObjectName::new(&raw.metadata.namespace, &raw.metadata.name);
                let mut problems = Vec::new();
                let slice = from_k8s::slice(&raw, &mut problems);
                self.report("EndpointSlice", &name, problems);
                self.dirty.extend(self.cluster.set_slice(&name, slice));
            }
            Update::Node(_) => {}
            Update::Gone(kind, name) => self.forget(kind, &name),
            Update::Listed(kind, names) => self.keep_only(kind, &names),
        }
    }

    fn forget(&mut self, kind: Kind, name: &ObjectName) {
        match kind {
            Kind::Services => {
                self.reported.remove(&("Service", name.clone()));
                if self.cluster.set_service(name, None) {
                    self.dirty.insert(name.clone());
                }
            }
            Kind::Slices => {
                self.reported.remove(&("EndpointSlice", name.clone()));
                self.dirty.extend(self.cluster.set_slice(name, None));
            }
            // KP-138: the last node known goes on to count.
            Kind::Nodes => {}
        }
    }

    fn keep_only(&mut self, kind: Kind, names: &HashSet<ObjectName>) {
        let known: Vec<ObjectName> = match kind {
            Kind::Services => self.cluster.service_names().cloned().collect(),
            Kind::Slices => self.cluster.slice_names().cloned().collect(),
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

    /// Tries again what was refused, at the next plan: places may have become free.
    pub fn retry(&mut self) {
        self.dirty.extend(self.refused.keys().map(|port| port.service.clone()));
    }

    /// The writes that make the kernel hold what it should. None before every kind was listed: until
    /// then what an earlier agent left stays in force.
    pub fn plan(&mut self, now: Instant) -> Vec<Op> {
        if !self.is_ready() {
            return Vec::new();
        }
        if !self.started {
            self.started = true;
            return self.plan_all(now);
        }
        let mut ops = Vec::new();
        for name in std::mem::take(&mut self.dirty) {
            self.plan_service(now, &name, &mut ops);
        }
        ops
    }

    /// The first plan: what is held and not wanted goes, and the rest is put.
    fn plan_all(&mut self, now: Instant) -> Vec<Op> {
        self.dirty.clear();
        let wanted = desired(&self.cluster, &self.node);
        let gone: Vec<PortId> =
            self.planner.ports().filter(|port| !wanted.contains_key(port)).cloned().collect();
        let mut ops = Vec::new();
        for port in &gone {
            self.plan_port(now, port, None, &mut ops);
        }
        let names: Vec<ObjectName> = self.cluster.service_names().cloned().collect();
        for name in &names {
            self.plan_service(now, name, &mut ops);
        }
        ops
    }

    fn plan_service(&mut self, now: Instant, name: &ObjectName, ops: &mut Vec<Op>) {
        let wanted = desired_service(&self.cluster, &self.node, name);
        let before = self.planned.remove(name).unwrap_or_default();
        for port in before.iter().filter(|port| !wanted.contains_key(port)) {
            self.plan_port(now, port, None, ops);
        }
        for (port, tables) in &wanted {
            self.plan_port(now, port, Some(tables), ops);
        }
        if !wanted.is_empty() {
            self.planned.insert(name.clone(), wanted.into_keys().collect());
        }
    }

    fn plan_port(
        &mut self,
        now: Instant,
        port: &PortId,
        wanted: Option<&crate::desired::Port>,
        ops: &mut Vec<Op>,
    ) {
        let mut refusals = Vec::new();
        ops.extend(self.planner.plan(now, port, wanted, &mut refusals));
        if refusals.is_empty() {
            self.refused.remove(port);
        }
        for refusal in refusals {
            let text = describe(&refusal);
            if self.refused.insert(port.clone(), text.clone()).as_ref() != Some(&text) {
                tracing::warn!("{text}");
            }
        }
    }
}

fn describe(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Full { port, table } => format!(
            "Service {} port \"{}\": the table of {table} is full; it keeps what it had",
            port.service, port.port
        ),
        Refusal::Taken { port, frontend, holder } => format!(
            "Service {} port \"{}\": {}:{} belongs to the older Service {}",
            port.service, port.port, frontend.vip, frontend.port, holder.service
        ),
    }
}
