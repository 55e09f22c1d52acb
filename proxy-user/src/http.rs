//! Health and metrics over HTTP, at kube-proxy's addresses and paths (KP-117 to 122).

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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

/// How long something that was heard may be unwritten before load balancers should send elsewhere.
const OVERDUE: Duration = Duration::from_mins(1);
/// How long the agent may do nothing at all before it should be started anew.
const STUCK: Duration = Duration::from_mins(2);

/// What the agent tells of itself.
pub struct Status {
    started: Instant,
    /// When it last went round, in milliseconds since it has started.
    beat: AtomicU64,
    /// When the kernel last held all that was heard.
    written: AtomicU64,
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
    relays: [AtomicUsize; 2],
    usage: Mutex<Vec<Use>>,
}

impl Status {
    /// The status of an agent that has just started.
    pub fn new(bpffs_root: PathBuf, config: Value) -> Self {
        Self {
            started: Instant::now(),
            beat: AtomicU64::new(0),
            written: AtomicU64::new(0),
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
            relays: Default::default(),
            usage: Mutex::default(),
        }
    }

    /// Whether the kernel follows the cluster.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Notes that the agent goes round, and whether all that it has heard is written.
    pub fn beats(&self, is_written: bool) {
        let now = self.age().as_millis().try_into().unwrap_or(u64::MAX);
        self.beat.store(now, Ordering::Relaxed);
        if is_written {
            self.written.store(now, Ordering::Relaxed);
        }
    }

    fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// How long ago something was.
    fn since(&self, when: &AtomicU64) -> Duration {
        self.age().saturating_sub(Duration::from_millis(when.load(Ordering::Relaxed)))
    }

    /// Whether the kernel follows the cluster and is not behind.
    pub fn is_healthy(&self) -> bool {
        self.is_ready() && self.since(&self.written) < OVERDUE
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

    /// Notes how many uplinks have XDP, and how many were to have it and are left to tc.
    pub fn relays(&self, now: [usize; 2]) {
        self.relays.iter().zip(now).for_each(|(known, now)| known.store(now, Ordering::Relaxed));
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
        let [relays, left] = &self.relays;
        metric("portal_xdp_links", "gauge", "Uplinks that are served by XDP too.", load(relays));
        let help = "Uplinks that were to be served by XDP and are left to tc.";
        metric("portal_xdp_links_left", "gauge", help, load(left));
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
        text.push_str("# HELP portal_outcomes_total Packets and socket calls by what was done. A live flow's are told once in four seconds.\n");
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
    let (healthy, eligible) = (status.is_healthy(), status.eligible.load(Ordering::Relaxed));
    let mut report = report(&status);
    report["nodeEligible"] = eligible.into();
    answer(healthy && eligible, &report)
}

/// Whether the agent goes round (KP-119): one that waits for ever for something is to be started anew.
async fn live(State(status): State<Arc<Status>>) -> Response {
    answer(status.since(&status.beat) < STUCK, &report(&status))
}

/// What is said of each family. What is heard is written at once; what the kernel refuses then is
/// counted by `portal_refused_writes_total`, and written as soon as it takes it.
fn report(status: &Status) -> Value {
    let now = jiff::Timestamp::now();
    let healthy = status.is_healthy();
    let written = jiff::SignedDuration::try_from(status.since(&status.written));
    let updated = written.ok().and_then(|ago| now.checked_sub(ago).ok()).unwrap_or(now).to_string();
    let family = json!({"lastUpdated": updated, "healthy": healthy});
    json!({
        "lastUpdated": updated,
        "currentTime": now.to_string(),
        "healthy": healthy,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Fault F3: an agent that waits for ever, or that the kernel refuses everything, says so.
    #[tokio::test]
    async fn health_tells_of_an_agent_that_is_stuck_or_behind() {
        let mut status = Status::new(PathBuf::new(), Value::Null);
        status.synced(1, true);
        status.beats(true);
        let asked = async |status: Status| {
            let status = Arc::new(status);
            let health = health(State(Arc::clone(&status))).await.status();
            let live = live(State(Arc::clone(&status))).await.status();
            (Arc::into_inner(status).expect("no other"), [health, live].map(|s| s.is_success()))
        };
        let mut answers;
        (status, answers) = asked(status).await;
        assert_eq!(answers, [true, true]);
        // It goes round, but the kernel takes nothing.
        status.started -= OVERDUE;
        status.beats(false);
        (status, answers) = asked(status).await;
        assert_eq!(answers, [false, true]);
        status.beats(true);
        (status, answers) = asked(status).await;
        assert_eq!(answers, [true, true]);
        // It does nothing at all.
        status.started -= STUCK;
        (_, answers) = asked(status).await;
        assert_eq!(answers, [false, false]);
    }
}
