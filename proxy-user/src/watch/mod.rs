//! Objects come in: from an API server or from a folder of manifests, as the same stream of updates.

mod client;
mod follow;
mod manifests;
pub mod raw;
pub mod strict;

use std::collections::HashSet;
use std::path::PathBuf;

use anyhow::{Context, Result};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::model::ObjectName;
pub use client::ApiServer;

/// A kind of object that is watched.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// Services.
    Services,
    /// `EndpointSlices`.
    Slices,
    /// The agent's own Node.
    Nodes,
    /// The Pods of the agent's own node.
    Pods,
}

/// All kinds that must be known before anything is written (KP-126).
pub fn kinds(host_ports: bool) -> Vec<Kind> {
    let mut kinds = vec![Kind::Services, Kind::Slices, Kind::Nodes];
    kinds.extend(host_ports.then_some(Kind::Pods));
    kinds
}

/// What was heard of the cluster.
#[derive(Debug)]
pub enum Update {
    /// A Service is as given.
    Service(Box<raw::Service>),
    /// A slice is as given.
    Slice(raw::EndpointSlice),
    /// The node is as given.
    Node(raw::Node),
    /// A pod is as given.
    Pod(Box<raw::Pod>),
    /// An object is gone.
    Gone(Kind, ObjectName),
    /// A list is complete: of that kind there is nothing else.
    Listed(Kind, HashSet<ObjectName>),
}

/// Where objects come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// An API server.
    Api(ApiServer),
    /// A folder of YAML files.
    Manifests(PathBuf),
}

/// How many updates may wait before the sources do.
const QUEUE: usize = 4096;

/// Starts to follow these kinds. The tasks run for as long as the agent does.
///
/// # Errors
/// If the source is unusable: no credentials, no such folder.
pub async fn start(
    source: Source,
    node: &str,
    kinds: Vec<Kind>,
    tasks: &mut JoinSet<Result<()>>,
) -> Result<mpsc::Receiver<Update>> {
    let (updates, receiver) = mpsc::channel(QUEUE);
    match source {
        Source::Api(server) => {
            let client = server.connect().await?;
            for kind in kinds {
                let (client, updates) = (client.clone(), updates.clone());
                match kind {
                    Kind::Services => tasks.spawn(follow::services(client, updates).run()),
                    Kind::Slices => tasks.spawn(follow::slices(client, updates).run()),
                    Kind::Nodes => tasks.spawn(follow::node(client, node, updates).run()),
                    Kind::Pods => tasks.spawn(follow::pods(client, node, updates).run()),
                };
            }
        }
        Source::Manifests(folder) => {
            std::fs::read_dir(&folder)
                .with_context(|| format!("cannot read the manifests in {}", folder.display()))?;
            tasks.spawn(manifests::follow(folder, node.to_owned(), kinds, updates));
        }
    }
    Ok(receiver)
}
