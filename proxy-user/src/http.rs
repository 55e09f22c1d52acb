//! Health and metrics over HTTP, at kube-proxy's addresses and paths (KP-117 to 122).

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HeaderName};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};

use crate::kernel::{Swept, read};
use crate::plan::Use;

/// How long to wait before an address that is taken is tried again (KP-124).
const RETRY: Duration = Duration::from_secs(5);

/// What the agent tells of itself.
pub struct Status {
    bpffs_root: PathBuf,
    /// What the agent was asked to do.
    config: Value,
    ready: AtomicBool,
    /// Load balancers may send here.
    eligible: AtomicBool,
    services: AtomicUsize,
    flow_records: AtomicUsize,
    swept_records: AtomicUsize,
    /// How full the tables were that are counted by sweeps.
    swept_tables: Mutex<Vec<Use>>,
    refusals: AtomicUsize,
    reattached: AtomicUsize,
    usage: Mutex<Vec<Use>>,
}

impl Status {
    /// The status of an agent that has just started.
    pub fn new(bpffs_root: PathBuf, config: Value) -> Self {
        Self {
            bpffs_root,
            config,
            ready: AtomicBool::new(false),
            eligible: AtomicBool::new(true),
            services: AtomicUsize::new(0),
            flow_records: AtomicUsize::new(0),
            swept_records: AtomicUsize::new(0),
            swept_tables: Mutex::default(),
            refusals: AtomicUsize::new(0),
            reattached: AtomicUsize::new(0),
            usage: Mutex::default(),
        }
    }

    /// Whether the kernel follows the cluster.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Notes that the kernel holds what it should.
    pub fn synced(&self, services: usize, eligible: bool) {
        self.eligible.store(eligible, Ordering::Relaxed);
        self.services.store(services, Ordering::Relaxed);
        self.ready.store(true, Ordering::Relaxed);
    }

    /// Notes what a sweep has found.
    pub fn swept(&self, swept: Swept) {
        self.flow_records.store(swept.records.into_iter().sum(), Ordering::Relaxed);
        self.swept_records.fetch_add(swept.removed, Ordering::Relaxed);
        *self.swept_tables.lock().expect("no panic while locked") = swept.tables;
    }

    /// Notes that the kernel refused a write.
    pub fn refused(&self) {
        self.refusals.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that so many programs were put back where they had been taken off.
    pub fn reattached(&self, programs: usize) {
        self.reattached.fetch_add(programs, Ordering::Relaxed);
    }

    /// Notes how much of each table is in use that the agent fills.
    pub fn used(&self, usage: Vec<Use>) {
        *self.usage.lock().expect("no panic while locked") = usage;
    }

    /// The metrics in Prometheus' text format.
    fn metrics(&self) -> String {
        let mut text = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, value: usize| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
        };
        let load = |value: &AtomicUsize| value.load(Ordering::Relaxed);
        metric("portal_ready", "gauge", "The kernel follows the cluster.", self.is_ready().into());
        metric("portal_services", "gauge", "Services that are proxied.", load(&self.services));
        let help = "Records of live flows at the last sweep, two per flow.";
        metric("portal_flow_records", "gauge", help, load(&self.flow_records));
        let help = "Records of ended flows removed by sweeps.";
        metric("portal_swept_records_total", "counter", help, load(&self.swept_records));
        let help = "How often the kernel refused a write to the maps.";
        metric("portal_refused_writes_total", "counter", help, load(&self.refusals));
        let help = "Programs put back where someone had taken them off.";
        metric("portal_reattached_programs_total", "counter", help, load(&self.reattached));
        let mut usage = self.usage.lock().expect("no panic while locked").clone();
        usage.extend(self.swept_tables.lock().expect("no panic while locked").iter().cloned());
        for (name, help, value) in [
            (
                "portal_table_used",
                "Elements of a table that are in use.",
                (|of: &Use| of.used) as fn(&Use) -> usize,
            ),
            ("portal_table_size", "Elements that a table has.", |of: &Use| of.size),
        ] {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
            for of in &usage {
                let _ = writeln!(text, "{name}{{table=\"{}\"}} {}", of.table, value(of));
            }
        }
        text.push_str("# HELP portal_outcomes_total Packets and socket calls by what was done. A live flow's are told once a second.\n");
        text.push_str("# TYPE portal_outcomes_total counter\n");
        for (outcome, count) in read::outcomes(&self.bpffs_root).unwrap_or_default() {
            let _ =
                writeln!(text, "portal_outcomes_total{{outcome=\"{}\"}} {count}", outcome.label());
        }
        text
    }
}

/// What is served at --healthz-bind-address.
pub fn health_routes(status: Arc<Status>) -> Router {
    Router::new().route("/healthz", get(health)).route("/livez", get(live)).with_state(status)
}

/// What is served at --metrics-bind-address, which is not for everyone.
pub fn metrics_routes(status: Arc<Status>) -> Router {
    health_routes(Arc::clone(&status)).merge(
        Router::new()
            .route("/metrics", get(metrics))
            .route("/configz", get(config))
            .route("/proxyMode", get(|| async { "portal" }))
            .with_state(status),
    )
}

/// Serves at an address, for ever. An address that is taken is tried again.
///
/// # Errors
/// None at present.
pub async fn serve(address: SocketAddr, routes: Router) -> Result<()> {
    loop {
        let error = match tokio::net::TcpListener::bind(address).await {
            Ok(listener) => axum::serve(listener, routes.clone()).await.err(),
            Err(error) => Some(error),
        };
        if let Some(error) = error {
            tracing::warn!("cannot serve at {address}: {error}; trying again in {RETRY:?}");
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Whether load balancers should send here (KP-117). Before the first sync they should not: unlike
/// kube-proxy, which calls itself healthy then (docs/conformance.md, KP-120).
async fn health(State(status): State<Arc<Status>>) -> Response {
    let (ready, eligible) = (status.is_ready(), status.eligible.load(Ordering::Relaxed));
    let mut report = report(ready);
    report["nodeEligible"] = eligible.into();
    answer(ready && eligible, &report)
}

/// Whether the agent runs (KP-119).
async fn live(State(status): State<Arc<Status>>) -> Response {
    answer(true, &report(status.is_ready()))
}

/// What is said of each family. What is heard is written at once; what the kernel refuses then is
/// counted by `portal_refused_writes_total`, and written as soon as it takes it.
fn report(ready: bool) -> Value {
    let now = jiff::Timestamp::now().to_string();
    let family = json!({"lastUpdated": now, "healthy": ready});
    json!({
        "lastUpdated": now,
        "currentTime": now,
        "healthy": ready,
        "status": {"IPv4": family, "IPv6": family},
    })
}

/// What the agent was asked to do (KP-123).
async fn config(State(status): State<Arc<Status>>) -> Response {
    answer(true, &status.config)
}

fn answer(good: bool, report: &Value) -> Response {
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [
        (CONTENT_TYPE, "application/json"),
        (HeaderName::from_static("x-content-type-options"), "nosniff"),
    ];
    (status, headers, report.to_string()).into_response()
}

async fn metrics(State(status): State<Arc<Status>>) -> Response {
    let headers = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (headers, status.metrics()).into_response()
}
