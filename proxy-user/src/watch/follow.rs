//! Follows one kind of object at the API server, for ever.
//!
//! Our own loop and not `kube::runtime::watcher`, which lacks what a node agent needs
//! (docs/decisions/0005): a fall-back from streamed to paged lists, a new list after HTTP 410, a look
//! at bookmarks as signs of life. One round is one request: a streamed list that goes on as a watch, a
//! paged list, or a watch from where the last one ended.
//!
//! Updates go out as they come, also while a list is under way: what was heard before a list is
//! complete is never less true for it. Only [`Update::Listed`] says what is not there.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::{Stream, StreamExt};
use kube::Client;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::Request;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::{Kind, Update, raw};
use crate::model::ObjectName;

/// The first wait after a failure; it doubles up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// The server sends a bookmark every minute. Silence for longer than this is a dead connection.
const SILENCE: Duration = Duration::from_secs(90);
/// How long the server may think before it begins to answer.
const ANSWER: Duration = Duration::from_secs(30);
/// A streamed list pauses for no longer than this between two objects.
const LIST_SILENCE: Duration = Duration::from_secs(20);
/// Asked of the server for a watch, in seconds.
const WATCH_TIMEOUT: u32 = 290;
const PAGE: u32 = 500;

const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// Marked for another proxy (KP-3).
const NOT_OTHERS: &str = "!service.kubernetes.io/service-proxy-name";
/// Not headless (KP-4).
const HAS_CLUSTER_IP: &str = "spec.clusterIP!=None";
/// Not headless (KP-6).
const NOT_HEADLESS: &str = "!service.kubernetes.io/headless";

/// Follows the Services that are proxied.
pub fn services(client: Client, updates: mpsc::Sender<Update>) -> Follower<raw::Service> {
    let (labels, fields) = (Some(NOT_OTHERS.to_owned()), Some(HAS_CLUSTER_IP.to_owned()));
    Follower::new(client, "/api/v1/services", labels, fields, updates)
}

/// Follows the slices that are proxied.
pub fn slices(client: Client, updates: mpsc::Sender<Update>) -> Follower<raw::EndpointSlice> {
    let path = "/apis/discovery.k8s.io/v1/endpointslices";
    Follower::new(client, path, Some(NOT_HEADLESS.to_owned()), None, updates)
}

/// Follows one Node.
pub fn node(client: Client, name: &str, updates: mpsc::Sender<Update>) -> Follower<raw::Node> {
    let fields = Some(format!("metadata.name={name}"));
    Follower::new(client, "/api/v1/nodes", None, fields, updates)
}

/// Follows the pods of one Node.
pub fn pods(client: Client, node: &str, updates: mpsc::Sender<Update>) -> Follower<raw::Pod> {
    let fields = Some(format!("spec.nodeName={node}"));
    Follower::new(client, "/api/v1/pods", None, fields, updates)
}

/// An object that can be followed.
pub trait Followed: DeserializeOwned + Clone + Send + 'static {
    /// Its kind.
    const KIND: Kind;
    /// Its metadata.
    fn meta(&self) -> &raw::Meta;
    /// The news that it is as it is.
    fn update(self) -> Update;
}

macro_rules! followed {
    ($($object:ident: $kind:ident, $update:ident;)+) => {$(
        impl Followed for raw::$object {
            const KIND: Kind = Kind::$kind;

            fn meta(&self) -> &raw::Meta {
                &self.metadata
            }

            fn update(self) -> Update {
                Update::$update(self.into())
            }
        }
    )+};
}
followed! {
    Service: Services, Service;
    EndpointSlice: Slices, Slice;
    Node: Nodes, Node;
    Pod: Pods, Pod;
}

/// How lists are asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lists {
    /// As a watch that begins with everything there is (Kubernetes 1.34, and 1.32).
    Streamed,
    /// Page by page.
    Paged,
}

/// Follows one kind of object.
pub struct Follower<T> {
    client: Client,
    request: Request,
    labels: Option<String>,
    fields: Option<String>,
    updates: mpsc::Sender<Update>,
    lists: Lists,
    /// Where the next watch goes on; `None` if a list is due.
    version: Option<String>,
    /// What a list under way has shown so far.
    seen: HashSet<ObjectName>,
    wait: Duration,
    object: std::marker::PhantomData<T>,
}

/// A page of a list.
#[derive(Deserialize)]
struct Page<T> {
    metadata: PageMeta,
    items: Option<Vec<T>>,
}

#[derive(Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[derive(Default)]
struct PageMeta {
    resource_version: String,
    r#continue: Option<String>,
}

impl<T: Followed> Follower<T> {
    fn new(
        client: Client,
        path: &str,
        labels: Option<String>,
        fields: Option<String>,
        updates: mpsc::Sender<Update>,
    ) -> Self {
        Self {
            client,
            request: Request::new(path),
            labels,
            fields,
            updates,
            lists: Lists::Streamed,
            version: None,
            seen: HashSet::new(),
            wait: FIRST_WAIT,
            object: std::marker::PhantomData,
        }
    }

    /// Follows until nobody listens any more.
    ///
    /// # Errors
    /// None: what goes wrong is logged and tried again.
    pub async fn run(mut self) -> Result<()> {
        while !self.updates.is_closed() {
            if let Err(error) = self.round().await {
                let advice = advice(T::KIND, &error);
                tracing::warn!("{:?}: {error:#}; trying again in {:?}{advice}", T::KIND, self.wait);
                sleep(self.wait).await;
                self.wait = (self.wait * 2).min(LONGEST_WAIT);
            }
        }
        Ok(())
    }

    /// One request and all that comes of it.
    async fn round(&mut self) -> Result<()> {
        let result = match (&self.version, self.lists) {
            (None, Lists::Paged) => self.list().await,
            _ => self.watch().await,
        };
        if let Err(error) = &result {
            self.learn(error);
        }
        result
    }

    /// What a failure says about the next try.
    fn learn(&mut self, error: &anyhow::Error) {
        let Some(error) = error.downcast_ref::<kube::Error>() else { return };
        match error {
            kube::Error::Api(status) if status.code == 410 => self.version = None,
            // The server knows no streamed lists (422), or a proxy before it does not (400, 404).
            kube::Error::Api(status)
                if (400..500).contains(&status.code)
                    && ![401, 403, 429].contains(&status.code)
                    && self.version.is_none() =>
            {
                self.lists = Lists::Paged;
            }
            // An event was lost: only a list can tell what it was.
            kube::Error::SerdeError(_) => self.version = None,
            _ => {}
        }
    }

    async fn list(&mut self) -> Result<()> {
        self.seen.clear();
        let mut parameters = ListParams {
            label_selector: self.labels.clone(),
            field_selector: self.fields.clone(),
            limit: Some(PAGE),
            ..ListParams::default()
        };
        loop {
            let request = self.request.list(&parameters)?;
            let answer = timeout(ANSWER, self.client.request(request)).await;
            let page: Page<T> = answer.context("the API server does not answer")??;
            for object in page.items.unwrap_or_default() {
                self.tell(object).await?;
            }
            parameters.continue_token = page.metadata.r#continue.filter(|token| !token.is_empty());
            if parameters.continue_token.is_none() {
                return self.listed(page.metadata.resource_version).await;
            }
        }
    }

    async fn listed(&mut self, version: String) -> Result<()> {
        self.version = Some(version);
        let seen = std::mem::take(&mut self.seen);
        self.send(Update::Listed(T::KIND, seen)).await
    }

    async fn watch(&mut self) -> Result<()> {
        let listing = self.version.is_none();
        let parameters = WatchParams {
            label_selector: self.labels.clone(),
            field_selector: self.fields.clone(),
            timeout: Some(WATCH_TIMEOUT),
            bookmarks: true,
            send_initial_events: listing,
        };
        self.seen.clear();
        let version = self.version.clone().unwrap_or_else(|| "0".to_owned());
        let request = self.request.watch(&parameters, &version)?;
        let answer = timeout(ANSWER, self.client.request_events::<T>(request)).await;
        let events = answer.context("the API server does not answer")??;
        let mut events = std::pin::pin!(stream_of(events));
        let mut heard = false;
        loop {
            let listing = self.version.is_none();
            let patience = if listing { LIST_SILENCE } else { SILENCE };
            match timeout(patience, events.next()).await {
                Ok(Some(event)) => {
                    heard = true;
                    self.hear(event?).await?;
                }
                // Whoever answers like that must not be asked without a pause.
                Ok(None) if !heard => bail!("the watch ended before it said anything"),
                Ok(None) if listing => bail!("the streamed list ended before it was complete"),
                Ok(None) => return Ok(()),
                Err(_) if listing => {
                    self.lists = Lists::Paged;
                    bail!("the streamed list does not come to its end; asking for pages");
                }
                Err(_) => bail!("nothing was heard for {} s", SILENCE.as_secs()),
            }
        }
    }

    async fn hear(&mut self, event: WatchEvent<T>) -> Result<()> {
        if !matches!(event, WatchEvent::Error(_)) {
            self.wait = FIRST_WAIT;
        }
        match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                self.advance(&object.meta().resource_version);
                self.tell(object).await
            }
            WatchEvent::Deleted(object) => {
                self.advance(&object.meta().resource_version);
                let name = name_of(object.meta());
                self.seen.remove(&name);
                self.send(Update::Gone(T::KIND, name)).await
            }
            WatchEvent::Bookmark(bookmark) => {
                let version = bookmark.metadata.resource_version;
                if bookmark.metadata.annotations.contains_key(INITIAL_EVENTS_END)
                    && self.version.is_none()
                {
                    return self.listed(version).await;
                }
                self.advance(&version);
                Ok(())
            }
            WatchEvent::Error(status) => Err(kube::Error::Api(status).into()),
        }
    }

    /// Moves on, once a list was complete: until then only its end may say where to go on.
    fn advance(&mut self, version: &str) {
        if self.version.is_some() && !version.is_empty() {
            self.version = Some(version.to_owned());
        }
    }

    async fn tell(&mut self, object: T) -> Result<()> {
        let name = name_of(object.meta());
        if name.name.is_empty() {
            tracing::warn!("{:?}: an object without a name is ignored", T::KIND);
            return Ok(());
        }
        if self.version.is_none() {
            self.seen.insert(name);
        }
        self.send(object.update()).await
    }

    async fn send(&self, update: Update) -> Result<()> {
        // Nobody listens when the agent ends; `run` looks.
        let _ = self.updates.send(update).await;
        Ok(())
    }
}

/// What to do about an error, where that is known.
fn advice(kind: Kind, error: &anyhow::Error) -> &'static str {
    let is_forbidden = matches!(
        error.downcast_ref::<kube::Error>(),
        Some(kube::Error::Api(status)) if status.code == 403
    );
    match kind {
        _ if !is_forbidden => "",
        Kind::Pods => {
            ". Until then nothing is written: apply deploy/rbac.yaml, or do without host ports by \
             --host-ports=false"
        }
        _ => ". Until then nothing is written: apply deploy/rbac.yaml",
    }
}

fn name_of(meta: &raw::Meta) -> ObjectName {
    ObjectName::new(&meta.namespace, &meta.name)
}

/// Names the stream's items, which inference alone does not find.
fn stream_of<T>(
    events: impl Stream<Item = kube::Result<WatchEvent<T>>>,
) -> impl Stream<Item = kube::Result<WatchEvent<T>>> {
    events
}
