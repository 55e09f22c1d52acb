//! Health check node ports: where a load balancer asks whether this node has endpoints of a Service
//! (KP-101 to 108). A small HTTP server for each.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, RwLock};

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinSet};

use crate::desired::health::HealthCheck;
use crate::model::ObjectName;

/// What a server answers.
type Answer = Arc<RwLock<(ObjectName, usize)>>;

/// Whether the kernel follows the cluster and is not behind.
pub type IsHealthy = Arc<dyn Fn() -> bool + Send + Sync>;

/// A health check that can't be served (KP-107).
pub struct Failure {
    /// The Service.
    pub service: ObjectName,
    /// Where it was to be served.
    pub address: SocketAddr,
    /// Why not.
    pub error: String,
}

/// A server at an address.
struct Server {
    answer: Answer,
    task: AbortHandle,
}

/// The servers of this node.
pub struct HealthChecks {
    is_healthy: IsHealthy,
    wanted: BTreeMap<SocketAddr, (ObjectName, usize)>,
    servers: HashMap<SocketAddr, Server>,
    /// Why some can't be served, so that it is said once.
    told: HashMap<SocketAddr, String>,
    tasks: JoinSet<()>,
}

impl HealthChecks {
    /// None yet.
    pub fn new(is_healthy: IsHealthy) -> Self {
        Self {
            is_healthy,
            wanted: BTreeMap::new(),
            servers: HashMap::new(),
            told: HashMap::new(),
            tasks: JoinSet::new(),
        }
    }

    /// Takes in which checks are to be served at which addresses (KP-102), and ends all others. Those that
    /// are served answer so from now on.
    pub async fn set(&mut self, checks: &[HealthCheck], addresses: &BTreeSet<IpAddr>) {
        self.wanted.clear();
        for check in checks {
            for address in addresses {
                let [v4, v6] = check.local;
                let local = if address.is_ipv4() { v4 } else { v6 };
                let address = SocketAddr::new(*address, check.port);
                let wanted = (check.service.clone(), local);
                if let Some(server) = self.servers.get(&address) {
                    server.answer.write().expect("no panic while locked").clone_from(&wanted);
                }
                self.wanted.insert(address, wanted);
            }
        }
        self.told.retain(|address, _| self.wanted.contains_key(address));
        let wanted = &self.wanted;
        let gone = self.servers.extract_if(|address, _| !wanted.contains_key(address));
        let end = |(_, server): (SocketAddr, Server)| {
            // Connections that are open are answered on.
            server.answer.write().expect("no panic while locked").1 = 0;
            server.task.abort();
        };
        let gone = gone.map(end).count();
        // Until their tasks have ended their ports are taken.
        for _ in 0..gone {
            self.tasks.join_next().await;
        }
    }

    /// Whether some are not served yet.
    pub fn is_missing_any(&self) -> bool {
        self.servers.len() < self.wanted.len()
    }

    /// Starts those that are missing: also those that could not listen before. Returns those that can't
    /// for a reason that was not told before.
    #[must_use]
    pub fn serve(&mut self) -> Vec<Failure> {
        let mut failures = Vec::new();
        while self.tasks.try_join_next().is_some() {}
        let servers = &self.servers;
        let missing: Vec<_> =
            self.wanted.iter().filter(|(address, _)| !servers.contains_key(address)).collect();
        for (address, wanted) in missing {
            let answer: Answer = Arc::new(RwLock::new(wanted.clone()));
            match listen(*address) {
                Ok(listener) => {
                    let task = self.tasks.spawn(run(
                        listener,
                        Arc::clone(&answer),
                        Arc::clone(&self.is_healthy),
                    ));
                    self.servers.insert(*address, Server { answer, task });
                    self.told.remove(address);
                }
                Err(error) => {
                    let (service, address, error) = (wanted.0.clone(), *address, error.to_string());
                    if self.told.insert(address, error.clone()).as_ref() != Some(&error) {
                        failures.push(Failure { service, address, error });
                    }
                }
            }
        }
        failures
    }
}

/// A listener of one family, so that both can have the same port.
fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(128)?;
    TcpListener::from_std(socket.into())
}

async fn run(listener: TcpListener, answer: Answer, is_healthy: IsHealthy) {
    let handler = move || {
        let (service, local) = answer.read().expect("no panic while locked").clone();
        std::future::ready(respond(&service, local, is_healthy()))
    };
    // Any path, any method (KP-103).
    let _ = axum::serve(listener, Router::new().fallback(handler)).await;
}

/// Byte for byte what kube-proxy answers (KP-103, KP-104).
fn respond(service: &ObjectName, local: usize, is_healthy: bool) -> Response {
    let ObjectName { namespace, name } = service;
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\
         \t\"localEndpoints\": {local},\n\t\"serviceProxyHealthy\": {is_healthy}\n}}"
    );
    let status =
        if local > 0 && is_healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [
        (CONTENT_TYPE.as_str(), "application/json".to_owned()),
        ("x-content-type-options", "nosniff".to_owned()),
        ("x-load-balancing-endpoint-weight", local.to_string()),
    ];
    (status, headers, body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_behind_takes_no_more_traffic() {
        let service = ObjectName::new("default", "web");
        let status = |local, is_healthy| respond(&service, local, is_healthy).status().as_u16();
        assert_eq!([status(1, true), status(0, true), status(1, false)], [200, 503, 503]);
    }
}
