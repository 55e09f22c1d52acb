//! `portal services`, `backends` and `flows`: the pinned maps as kubectl would show them.

use std::collections::{HashMap, HashSet};

use anyhow::Result;
use proxy_common::settings::seconds;
use proxy_common::tables::{Algorithm, Range};

use super::Place;
use super::table::{Column, Output, Table};
use crate::desired::PortId;
use crate::kernel::read;
use crate::model::IpFamily;
use crate::plan::{Actual, ActualService, BackendEntry, Lead};

/// The flags of listings.
#[derive(clap::Args)]
pub struct Args {
    /// Only those of this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,

    /// How to print
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,

    #[command(flatten)]
    place: Place,
}

impl Args {
    fn wants(&self, port: Option<&PortId>) -> bool {
        self.namespace
            .as_deref()
            .is_none_or(|namespace| port.is_some_and(|port| *port.service.namespace == *namespace))
    }
}

/// Lists Service ports, a row per frontend.
pub fn services(args: &Args) -> Result<()> {
    let actual = read::services(&args.place.bpffs_root)?;
    let mut table = Table::new(&[
        Column::always("NAMESPACE"),
        Column::always("NAME"),
        Column::always("PORT-NAME"),
        Column::always("VIP"),
        Column::always("PORT"),
        Column::always("PROTOCOL"),
        Column::always("BACKENDS"),
        Column::wide("LOCAL"),
        Column::wide("ALGORITHM"),
        Column::wide("FAMILY"),
        Column::wide("ID"),
        Column::wide("SLOTS"),
    ]);
    let counts = backend_counts(&actual);
    for service in sorted(&actual) {
        let Lead { id, cluster, local, flags, .. } = service.lead;
        let port = actual.names.get(&id);
        let family = IpFamily::of(service.frontend.vip);
        let [backends, here] = counts.get(&(family, id)).copied().unwrap_or_default();
        if args.wants(port) {
            table.row(names(port).into_iter().chain([
                // The unspecified address stands for the node's own: it is a NodePort.
                service.frontend.vip.to_string(),
                service.frontend.port.to_string(),
                read::protocol(service.frontend.protocol.number()).to_owned(),
                backends.to_string(),
                here.to_string(),
                algorithm(flags).to_owned(),
                family_name(family).to_owned(),
                id.to_string(),
                format!("{}+{}", cluster.members, cluster.count + local.count),
            ]));
        }
    }
    table.print(args.output)
}

fn sorted(actual: &Actual) -> Vec<&ActualService> {
    let mut services: Vec<&ActualService> = actual.services.iter().collect();
    services.sort_by_key(|service| (actual.names.get(&service.lead.id), service.frontend));
    services
}

/// Namespace, name and port name.
fn names(port: Option<&PortId>) -> [String; 3] {
    let Some(port) = port else { return ["?".to_owned(), "?".to_owned(), String::new()] };
    [port.service.namespace.to_string(), port.service.name.to_string(), port.port.clone()]
}

/// Lists backends, a row per endpoint of a Service port.
pub fn backends(args: &Args) -> Result<()> {
    let actual = read::services(&args.place.bpffs_root)?;
    let mut table = Table::new(&[
        Column::always("NAMESPACE"),
        Column::always("NAME"),
        Column::always("PORT-NAME"),
        Column::always("BACKEND"),
        Column::always("PROTOCOL"),
        Column::always("STATE"),
        Column::always("NODE"),
        Column::wide("NUMBER"),
        Column::wide("GENERATION"),
    ]);
    let in_use = slots_by_family(&actual);
    let mut backends: Vec<_> = actual.backends.iter().filter(|b| b.entry.serving).collect();
    backends.sort_by_key(|b| (actual.names.get(&b.entry.service), b.entry.address));
    for backend in backends {
        let port = actual.names.get(&backend.entry.service);
        if args.wants(port) {
            let usable = in_use.contains(&(backend.family, backend.number));
            table.row(names(port).into_iter().chain([
                backend.entry.address.to_string(),
                port.map_or("?", |p| read::protocol(p.protocol.number())).to_owned(),
                state(usable).to_owned(),
                place(backend.entry).to_owned(),
                backend.number.to_string(),
                backend.entry.generation.to_string(),
            ]));
        }
    }
    table.print(args.output)
}

/// The backends that slots lead to.
fn slots_by_family(actual: &Actual) -> HashSet<(IpFamily, u32)> {
    let mut found = HashSet::new();
    for service in &actual.services {
        let family = IpFamily::of(service.frontend.vip);
        for choice in [service.lead.cluster, service.lead.local] {
            let slot = |index: u32| actual.slots.get(index as usize).copied();
            for index in 0..choice.count {
                let position = if choice.table == Range::NO_TABLE {
                    Some(index)
                } else {
                    slot(choice.table.saturating_add(index))
                };
                let number = position.and_then(|p| slot(choice.members.saturating_add(p)));
                found.extend(number.map(|number| (family, number)));
            }
        }
    }
    found
}

fn algorithm(flags: u32) -> &'static str {
    Algorithm::ALL
        .into_iter()
        .find(|algorithm| algorithm.is_in(flags))
        .map_or("?", Algorithm::label)
}

/// How many backends each Service port has that take new flows, and how many of them on this node.
fn backend_counts(actual: &Actual) -> HashMap<(IpFamily, u32), [usize; 2]> {
    let mut counts: HashMap<(IpFamily, u32), [usize; 2]> = HashMap::new();
    for backend in &actual.backends {
        let [all, local] = counts.entry((backend.family, backend.entry.service)).or_default();
        *all += usize::from(backend.entry.usable);
        *local += usize::from(backend.entry.usable_local);
    }
    counts
}

const fn family_name(family: IpFamily) -> &'static str {
    match family {
        IpFamily::V4 => "IPv4",
        IpFamily::V6 => "IPv6",
    }
}

const fn state(usable: bool) -> &'static str {
    if usable { "ready" } else { "unused" }
}

const fn place(entry: BackendEntry) -> &'static str {
    if entry.local { "local" } else { "remote" }
}

/// Lists flows, a row each.
pub fn flows(args: &Args) -> Result<()> {
    let actual = read::services(&args.place.bpffs_root)?;
    let labels = read::names(&actual);
    let mut table = Table::new(&[
        Column::always("PROTOCOL"),
        Column::always("CLIENT"),
        Column::always("VIP"),
        Column::always("BACKEND"),
        Column::always("STATE"),
        Column::always("EXPIRES"),
        Column::always("SERVICE"),
        Column::wide("SEEN-AS"),
    ]);
    let mut flows = read::flows(&args.place.bpffs_root)?;
    flows.sort_by_key(|flow| (flow.service, flow.client, flow.frontend));
    for flow in flows {
        if args.wants(actual.names.get(&flow.service)) {
            table.row([
                read::protocol(flow.proto).to_owned(),
                flow.client.to_string(),
                flow.frontend.to_string(),
                flow.backend.to_string(),
                flow.state.to_owned(),
                format!("{}s", seconds(flow.expires)),
                match labels.get(&flow.service) {
                    Some(label) => label.clone(),
                    None if !flow.has_backend => "(leaves the cluster)".to_owned(),
                    None => "(deleted)".to_owned(),
                },
                flow.seen_as.to_string(),
            ]);
        }
    }
    table.print(args.output)
}
