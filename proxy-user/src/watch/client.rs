//! The connection to an API server.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::http::HeaderValue;
use axum::http::header::USER_AGENT;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Which API server, and with whose credentials.
#[derive(Clone, Default, Debug)]
pub struct ApiServer {
    /// A kubeconfig; without it the in-cluster configuration, then the default kubeconfig.
    pub kubeconfig: Option<PathBuf>,
    /// Overrides the server's URL. In a cluster the configured one is a VIP, which this very agent
    /// must program first.
    pub url: Option<String>,
}

impl ApiServer {
    /// Makes a client. Nothing is sent yet.
    ///
    /// # Errors
    /// If there are no usable credentials; says where they were looked for.
    pub async fn connect(&self) -> Result<Client> {
        let mut config = self.config().await?;
        if let Some(url) = &self.url {
            let old = config.cluster_url.host().map(str::to_owned);
            config.cluster_url = url.parse().with_context(|| format!("{url} is no URL"))?;
            // The certificate is for the configured name, not for the address given.
            config.tls_server_name = config.tls_server_name.or(old);
        }
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        // Retries would hide errors for minutes; the follower has its own.
        config.default_retry = false;
        // Picked up from the environment of a shell, where NO_PROXY would be looked at too.
        config.proxy_url = None;
        let agent = concat!("portal/", env!("CARGO_PKG_VERSION"));
        config.headers.push((USER_AGENT, HeaderValue::from_static(agent)));
        Client::try_from(config).context("cannot make a client for the API server")
    }

    async fn config(&self) -> Result<Config> {
        if let Some(path) = &self.kubeconfig {
            let read = || format!("cannot use the kubeconfig {}", path.display());
            let kubeconfig = Kubeconfig::read_from(path).with_context(read)?;
            let options = KubeConfigOptions::default();
            return Config::from_custom_kubeconfig(kubeconfig, &options).await.with_context(read);
        }
        let in_cluster = match Config::incluster() {
            Ok(config) => return Ok(config),
            Err(error) => error,
        };
        Config::from_kubeconfig(&KubeConfigOptions::default()).await.with_context(|| {
            format!(
                "no API server: this is no pod of a cluster ({in_cluster}), and there is no default \
                 kubeconfig. Name one with --kubeconfig, or a folder of YAML with --manifests"
            )
        })
    }
}
