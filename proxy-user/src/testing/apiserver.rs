//! A stand-in for kube-apiserver: lists, watches, streamed lists and bookmarks over HTTP, and faults
//! on demand (kube-rs.md section 8).
//!
//! Faithful where it matters to a watcher: one rising resource version over all kinds, selectors
//! judged on the old and the new object, deletions with a version of their own, a watch that first
//! replays what happened since its version, 410 for a version too old to be remembered.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use futures::{Stream, stream};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::sync::watch;

/// How many changes are remembered for watches that come back.
const HISTORY: usize = 10_000;
/// An idle watch hears a bookmark this often.
const BOOKMARKS: Duration = Duration::from_secs(1);

/// Path of a kind's list, by kind.
const PATHS: [(&str, &str); 4] = [
    ("/api/v1/services", "Service"),
    ("/apis/discovery.k8s.io/v1/endpointslices", "EndpointSlice"),
    ("/api/v1/nodes", "Node"),
    ("/api/v1/pods", "Pod"),
];

/// How the server misbehaves.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Streamed lists are refused with 422, as before Kubernetes 1.34.
    pub no_streamed_lists: bool,
    /// A watch that begins at a version gets HTTP 410.
    pub gone_on_watch: bool,
    /// Every request gets this status.
    pub refuse: Option<u16>,
}

type Key = (String, String, String);

#[derive(Clone)]
struct Change {
    version: u64,
    kind: String,
    old: Option<Value>,
    new: Option<Value>,
}

#[derive(Default)]
struct Store {
    version: u64,
    /// Watches older than this get 410.
    floor: u64,
    objects: BTreeMap<Key, Value>,
    history: VecDeque<Change>,
    faults: Faults,
    events: Vec<Value>,
    /// Raised to end all open watches.
    epoch: u64,
}

/// The stand-in. Clones are handles to the same server.
#[derive(Clone)]
pub struct ApiServer {
    store: Arc<Mutex<Store>>,
    /// Tells watches that something happened.
    changed: Arc<watch::Sender<u64>>,
}

impl Default for ApiServer {
    fn default() -> Self {
        Self::new()
    }
}

impl ApiServer {
    /// An empty cluster, not yet listening.
    pub fn new() -> Self {
        let store = Store { version: 1, ..Store::default() };
        let (changed, _) = watch::channel(0);
        Self { store: Arc::new(Mutex::new(store)), changed: Arc::new(changed) }
    }

    /// Serves at a listener, such as one in a node's namespace, until the process ends.
    pub fn listen(&self, listener: TcpListener) {
        let server = self.clone();
        listener.set_nonblocking(true).expect("a fresh socket");
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(server.serve(listener));
        });
    }

    async fn serve(self, listener: TcpListener) {
        let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
        while let Ok((connection, _)) = listener.accept().await {
            // As Go's servers have it: otherwise an event waits for the answer to the one before.
            connection.set_nodelay(true).expect("a fresh socket");
            let server = self.clone();
            tokio::spawn(async move {
                let answer = service_fn(|request| {
                    let server = server.clone();
                    async move {
                        Ok::<_, Infallible>(match *request.method() {
                            Method::POST => server.create(request).await,
                            _ => server.answer(&request),
                        })
                    }
                });
                let http = hyper::server::conn::http1::Builder::new();
                // A client that hangs up is no error of ours.
                let _ = http.serve_connection(TokioIo::new(connection), answer).await;
            });
        }
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().expect("no panic while locked")
    }

    /// Creates or replaces an object.
    pub fn put(&self, object: Value) {
        let key = key_of(&object);
        self.change(key, Some(object));
    }

    /// Deletes an object of namespace `default`.
    pub fn delete(&self, kind: &str, name: &str) {
        let namespace = if kind == "Node" { "" } else { "default" };
        self.change((kind.to_owned(), namespace.to_owned(), name.to_owned()), None);
    }

    fn change(&self, key: Key, new: Option<Value>) {
        let mut store = self.store();
        store.version += 1;
        let version = store.version;
        let stamp = |mut object: Value| {
            object["metadata"]["resourceVersion"] = version.to_string().into();
            object
        };
        let new = new.map(stamp);
        let kind = key.0.clone();
        let old = match &new {
            Some(new) => store.objects.insert(key, new.clone()),
            None => store.objects.remove(&key),
        };
        // A deleted object carries the version of its deletion.
        let old = if new.is_none() { old.map(stamp) } else { old };
        store.history.push_back(Change { version, kind, old, new });
        if store.history.len() > HISTORY {
            let dropped = store.history.pop_front().expect("it is not empty");
            store.floor = dropped.version;
        }
        drop(store);
        self.wake();
    }

    /// Changes how the server misbehaves, from the next request on.
    pub fn misbehave(&self, faults: Faults) {
        self.store().faults = faults;
    }

    /// Ends all open watches.
    pub fn cut(&self) {
        self.store().epoch += 1;
        self.wake();
    }

    /// Forgets what happened so far, as a compaction does: watches from before get 410.
    pub fn compact(&self) {
        let mut store = self.store();
        store.version += 1;
        store.floor = store.version;
        store.history.clear();
    }

    fn wake(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Takes in an Event, the one kind of object that an agent writes.
    async fn create(&self, request: Request<Incoming>) -> Response<BoxBody<Bytes, Infallible>> {
        let is_event = request.uri().path().starts_with("/apis/events.k8s.io/v1/namespaces/");
        let Ok(body) = request.into_body().collect().await else {
            return failure(400, "the body is cut short", "BadRequest");
        };
        let event: Option<Value> = serde_json::from_slice(&body.to_bytes()).ok();
        let Some(event) = event.filter(|_| is_event) else {
            return failure(403, "only Events may be created", "Forbidden");
        };
        self.store().events.push(event.clone());
        respond(StatusCode::CREATED, Full::new(Bytes::from(event.to_string())).boxed())
    }

    /// The Events that agents have sent.
    pub fn events(&self) -> Vec<Value> {
        self.store().events.clone()
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<BoxBody<Bytes, Infallible>> {
        let faults = self.store().faults.clone();
        if let Some(code) = faults.refuse {
            return failure(code, "refused on demand", "InternalError");
        }
        let query = Query::parse(request.uri().query().unwrap_or_default());
        let Some((_, kind)) = PATHS.iter().find(|(path, _)| *path == request.uri().path()) else {
            return failure(404, "the server could not find the requested resource", "NotFound");
        };
        if !query.watch {
            return self.list(kind, &query);
        }
        if query.initial_events && faults.no_streamed_lists {
            return failure(422, "sendInitialEvents is forbidden for watch", "Invalid");
        }
        if !query.initial_events && (faults.gone_on_watch || query.version < self.store().floor) {
            return failure(410, "too old resource version", "Expired");
        }
        self.watch(kind, query)
    }

    fn list(&self, kind: &str, query: &Query) -> Response<BoxBody<Bytes, Infallible>> {
        let store = self.store();
        let items: Vec<&Value> =
            of_kind(&store, kind).filter(|object| query.selects(object)).collect();
        let start = query.offset.min(items.len());
        let end = query.limit.map_or(items.len(), |limit| (start + limit).min(items.len()));
        let mut meta = json!({"resourceVersion": store.version.to_string()});
        if end < items.len() {
            meta["continue"] = end.to_string().into();
        }
        let body =
            json!({"kind": format!("{kind}List"), "metadata": meta, "items": &items[start..end]});
        respond(StatusCode::OK, Full::new(Bytes::from(body.to_string())).boxed())
    }

    fn watch(&self, kind: &str, query: Query) -> Response<BoxBody<Bytes, Infallible>> {
        let store = self.store();
        let mut lines = VecDeque::new();
        let mut version = query.version;
        if query.initial_events {
            version = store.version;
            let selected = of_kind(&store, kind).filter(|object| query.selects(object));
            lines.extend(selected.map(|object| event("ADDED", object)));
            lines.push_back(bookmark(kind, version, true));
        }
        let epoch = store.epoch;
        drop(store);
        let changed = self.changed.subscribe();
        let (server, kind) = (self.clone(), kind.to_owned());
        let watch = OpenWatch { server, kind, query, version, epoch, lines, changed };
        respond(StatusCode::OK, BodyExt::boxed(StreamBody::new(watch.frames())))
    }
}

/// A watch under way.
struct OpenWatch {
    server: ApiServer,
    kind: String,
    query: Query,
    version: u64,
    epoch: u64,
    lines: VecDeque<String>,
    changed: watch::Receiver<u64>,
}

impl OpenWatch {
    fn frames(self) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> {
        stream::unfold(self, |mut watch| async move {
            let line = watch.next_line().await?;
            Some((Ok(Frame::data(Bytes::from(line))), watch))
        })
    }

    async fn next_line(&mut self) -> Option<String> {
        loop {
            self.changed.borrow_and_update();
            self.catch_up()?;
            if let Some(line) = self.lines.pop_front() {
                return Some(line);
            }
            match tokio::time::timeout(BOOKMARKS, self.changed.changed()).await {
                Ok(changed) => changed.ok()?,
                Err(_) => return Some(bookmark(&self.kind, self.version, false)),
            }
        }
    }

    /// Puts what has happened since into lines. `None` if the watch is to end.
    fn catch_up(&mut self) -> Option<()> {
        let store = self.server.store();
        if store.epoch != self.epoch {
            return None;
        }
        let news = store.history.iter().filter(|change| change.version > self.version);
        let news = news.filter(|change| change.kind == self.kind);
        self.lines.extend(news.filter_map(|change| self.query.event(change)));
        self.version = store.version;
        Some(())
    }
}

fn of_kind<'a>(store: &'a Store, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    store.objects.iter().filter(move |((of, _, _), _)| of == kind).map(|(_, object)| object)
}

fn key_of(object: &Value) -> Key {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let meta = &object["metadata"];
    (text(&object["kind"]), text(&meta["namespace"]), text(&meta["name"]))
}

fn event(kind: &str, object: &Value) -> String {
    // A real server writes the type first; serde_json would sort.
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}

fn bookmark(kind: &str, version: u64, end_of_list: bool) -> String {
    let annotations =
        if end_of_list { json!({"k8s.io/initial-events-end": "true"}) } else { json!({}) };
    let meta = json!({"resourceVersion": version.to_string(), "annotations": annotations});
    event(
        "BOOKMARK",
        &json!({"kind": kind, "apiVersion": "v1", "metadata": meta, "endpoints": null}),
    )
}

fn respond(
    status: StatusCode,
    body: BoxBody<Bytes, Infallible>,
) -> Response<BoxBody<Bytes, Infallible>> {
    let response = Response::builder().status(status).header("content-type", "application/json");
    response.body(body).expect("a valid response")
}

fn failure(code: u16, message: &str, reason: &str) -> Response<BoxBody<Bytes, Infallible>> {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    });
    let code = StatusCode::from_u16(code).expect("a status code");
    respond(code, Full::new(Bytes::from(status.to_string())).boxed())
}

/// What a request asks for.
#[derive(Default)]
struct Query {
    watch: bool,
    initial_events: bool,
    version: u64,
    limit: Option<usize>,
    offset: usize,
    labels: Vec<(String, bool)>,
    fields: Vec<(String, String, bool)>,
}

impl Query {
    fn parse(query: &str) -> Self {
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let pairs: HashMap<&str, String> = pairs.map(|(key, value)| (key, decode(value))).collect();
        let get = |key: &str| pairs.get(key).map(String::as_str).unwrap_or_default();
        let selectors = |key| get(key).split(',').filter(|s| !s.is_empty()).collect::<Vec<_>>();
        Self {
            watch: get("watch") == "true",
            initial_events: get("sendInitialEvents") == "true",
            version: get("resourceVersion").parse().unwrap_or_default(),
            limit: get("limit").parse().ok(),
            offset: get("continue").parse().unwrap_or_default(),
            labels: selectors("labelSelector").into_iter().map(label_selector).collect(),
            fields: selectors("fieldSelector").into_iter().filter_map(field_selector).collect(),
        }
    }

    fn selects(&self, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        let has_labels =
            self.labels.iter().all(|(label, wanted)| labels.get(label).is_some() == *wanted);
        has_labels
            && self.fields.iter().all(|(path, value, equal)| {
                let field = path.split('.').fold(object, |object, field| &object[field]);
                (field.as_str() == Some(value)) == *equal
            })
    }

    /// The event that a change is to this watch: crossing the selection is an addition or a deletion.
    fn event(&self, change: &Change) -> Option<String> {
        let old = change.old.as_ref().filter(|object| self.selects(object));
        let new = change.new.as_ref().filter(|object| self.selects(object));
        match (old, new) {
            (None, None) => None,
            (None, Some(new)) => Some(event("ADDED", new)),
            (Some(_), Some(new)) => Some(event("MODIFIED", new)),
            (Some(old), None) => Some(event("DELETED", change.new.as_ref().unwrap_or(old))),
        }
    }
}

/// `label` or `!label`.
fn label_selector(text: &str) -> (String, bool) {
    match text.strip_prefix('!') {
        Some(label) => (label.to_owned(), false),
        None => (text.to_owned(), true),
    }
}

/// `path=value` or `path!=value`.
fn field_selector(text: &str) -> Option<(String, String, bool)> {
    if let Some((path, value)) = text.split_once("!=") {
        return Some((path.to_owned(), value.to_owned(), false));
    }
    let (path, value) = text.split_once('=')?;
    Some((path.to_owned(), value.to_owned(), true))
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let decoded = match byte {
            b'%' => {
                let digits: String = rest.by_ref().take(2).map(char::from).collect();
                u8::from_str_radix(&digits, 16).unwrap_or(b'?')
            }
            b'+' => b' ',
            other => other,
        };
        bytes.push(decoded);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
