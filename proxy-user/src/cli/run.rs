//! The flags of `portal run`, named as kube-proxy names them, resolved once.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::ValueEnum;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use ipnet::IpNet;
use proxy_common::settings::{Lifetimes, ticks};
use proxy_common::tables::Algorithm;
use serde_json::{Value, json};
use tracing_subscriber::EnvFilter;

use super::Place;
use crate::desired::node_ports::NodePortAddresses;
use crate::kernel::{Options, Sizes, SocketLb, TcMode, XdpMode, probe};
use crate::links::{Pattern, Role, Rule};
use crate::model::from_k8s::parse_range;
use crate::run::{Settings, run};
use crate::watch::{ApiServer, Source};

/// The flags of `portal run`.
#[derive(clap::Args)]
#[allow(clippy::struct_excessive_bools, reason = "flags of a command line")]
pub struct Args {
    /// A kubeconfig; without it the in-cluster configuration, then the default kubeconfig
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// Overrides the API server's URL. In a cluster, give its real address: the configured one is a
    /// VIP, which Portal must program first. Empty: no override
    #[arg(long, value_name = "URL")]
    master: Option<String>,

    /// Follow Services, `EndpointSlices` and Pods from a folder of YAML files instead of an API server
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kubeconfig", "master"])]
    manifests: Option<PathBuf>,

    /// This node's name, by which endpoints are known as local. Default: the host's name
    #[arg(long, value_name = "NAME")]
    hostname_override: Option<String>,

    /// The pods' address ranges, one per family: whom --masquerade-pods masquerades, and toward whom it does not
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = range)]
    cluster_cidr: Vec<IpNet>,

    /// How pods of this node are told from others: by what their links look like, or as this says. Pods of other nodes come
    /// from outside, where a policy asks (externalTrafficPolicy)
    #[arg(long, value_name = "MODE", value_enum, default_value = "ClusterCIDR")]
    detect_local_mode: DetectLocalMode,

    /// The bridge whose ports are pods' links, for `BridgeInterface`
    #[arg(long, value_name = "NAME", required_if_eq("detect_local_mode", "BridgeInterface"))]
    pod_bridge_interface: Option<String>,

    /// How the names of pods' links begin, for `InterfaceNamePrefix`
    #[arg(long, value_name = "PREFIX")]
    #[arg(required_if_eq("detect_local_mode", "InterfaceNamePrefix"))]
    pod_interface_name_prefix: Option<String>,

    /// Masquerade pods even to `ClusterIPs`, where the endpoint is on another node
    #[arg(long)]
    masquerade_all: bool,

    /// Masquerade what pods send out of the cluster: they are those in --cluster-cidr
    #[arg(long, requires = "cluster_cidr")]
    masquerade_pods: bool,

    /// Where pods go with their own address in spite of --masquerade-pods, besides --cluster-cidr
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = range)]
    #[arg(requires = "masquerade_pods")]
    masquerade_except: Vec<IpNet>,

    /// Which of the node's addresses take `NodePorts`: ranges, or "primary" for the node's first
    /// address of each family, which is the default
    #[arg(long, value_name = "CIDR|primary", value_delimiter = ',')]
    nodeport_addresses: Vec<String>,

    /// Whether pods of this node get the ports of the node that they ask for (hostPort). Say false
    /// where the CNI's portmap plugin sees to that
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    host_ports: bool,

    /// Where to serve metrics; empty for nowhere
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:10249")]
    metrics_bind_address: String,

    /// Where to serve health; empty for nowhere
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:10256")]
    healthz_bind_address: String,

    /// The cgroup2 directory whose sockets are translated. Default: the cgroup2 mount
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,

    #[command(flatten)]
    place: Place,

    /// Which sockets are translated when they connect, so that their traffic costs nothing
    #[arg(long, value_enum, default_value = "host")]
    socket_lb: SocketLb,

    /// Which uplinks get XDP beside tc: there packets of flows that take a short cut are sent on before the host stack
    #[arg(long, value_enum, default_value = "auto")]
    xdp: XdpMode,

    /// Against floods of new connections, on uplinks with XDP: above how many of them a second, as one CPU sees them, clients are
    /// asked to show that their address is their own before anything is kept of them; 0: never. Clients behind a firewall that
    /// follows connections can't show it, and are not served while the flood lasts
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    syn_guard: u32,

    /// Whether flows from outside to pods elsewhere may take a short cut past the host stack, where that would do nothing but
    /// forward them. The host's firewall then sees their beginning and end, and one packet a second of each direction
    #[arg(long, value_enum, default_value = "auto")]
    short_cut: ShortCuts,

    /// Whether what goes to a VIP from a link that has no programs is caught where it leaves the node: of pods that start while
    /// no agent runs. For that there is a pair of links, portal0 and portal1, and a table of routes to `ClusterIPs`
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    catch_all: bool,

    /// How programs are attached to links
    #[arg(long, value_enum, default_value = "auto")]
    tc: TcMode,

    /// How a new flow's backend is chosen, where a Service's annotation portal.dev/lb-algorithm does
    /// not say otherwise
    #[arg(long, value_name = "NAME", default_value = "maglev", value_parser = algorithms())]
    lb_algorithm: Algorithm,

    /// Whether `ClusterIPs` answer when they are pinged
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    vip_ping: bool,

    /// What links are for, as in pod=cali*,ignore=veth0. Default: found out
    #[arg(long, value_name = "ROLE=PATTERN", value_delimiter = ',')]
    interfaces: Vec<Rule>,

    /// How much the tables hold, and so how much kernel memory they take; counts when they are made
    #[arg(long, value_enum, default_value = "default")]
    table_size: TableSize,

    /// How many records of live flows each address family's table holds, two per flow; counts when the
    /// table is made. Default: as --table-size says
    #[arg(long, value_name = "NUMBER")]
    max_flows: Option<u32>,

    /// The same for flows that are not live: not answered, answered once, ended. The oldest make way, so
    /// these serve any number for a while. Default: as --table-size says
    #[arg(long, value_name = "NUMBER")]
    max_embryos: Option<u32>,

    /// How long a TCP connection may be idle
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = lifetime)]
    conntrack_tcp_timeout_established: u32,

    /// How long a TCP connection may be idle after one side has closed it
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = lifetime)]
    conntrack_tcp_timeout_close_wait: u32,

    /// How long a TCP flow lives whose client has not shown that it hears the backend
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = lifetime)]
    tcp_timeout_syn: u32,

    /// How long a masqueraded TCP flow's source port is held after its end, unless there is no other: as
    /// long as the backend has it in `TIME_WAIT`
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = lifetime)]
    tcp_timeout_port: u32,

    /// For how long after the very first start TCP connections to VIPs that are under way, and unknown, are left to
    /// the kernel: kube-proxy's before. Not where the kernel follows no connections
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = grace)]
    takeover_grace: u32,

    /// How long a UDP flow lives that is no stream: the client has not sent again after an answer
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = lifetime)]
    conntrack_udp_timeout: u32,

    /// How long a UDP stream may be idle
    #[arg(long, value_name = "TIME", default_value = "180s", value_parser = lifetime)]
    conntrack_udp_timeout_stream: u32,

    /// The source ports that masqueraded flows get if their client's own is not free
    #[arg(long, value_name = "FIRST-LAST", default_value = "32768-65535", value_parser = ports)]
    masquerade_ports: (u16, u16),

    /// Log every packet that is refused or dropped, with its link
    #[arg(long)]
    trace: bool,
}

/// Tables of fewer records are of no use, and for more the kernel does not find memory in one piece.
const MIN_RECORDS: u32 = 2;
const MAX_RECORDS: u32 = 1 << 26;

/// Whether flows may take a short cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum ShortCuts {
    /// None: the host stack sees every packet
    Off,
    /// Those that may
    Auto,
}

/// How much the tables hold.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum TableSize {
    /// A thousand Service ports, 16,000 live flows of each family: 20 MB
    Small,
    /// 30,000 Service ports of ten endpoints, 130,000 live flows of each family: 180 MB
    Default,
    /// 100,000 Service ports of ten endpoints, 500,000 live flows of each family: 401 MB
    Large,
}

/// kube-proxy's modes (KP-84 to 86).
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum DetectLocalMode {
    /// By what links look like
    #[value(name = "ClusterCIDR")]
    ClusterCidr,
    /// The same
    #[value(name = "NodeCIDR")]
    NodeCidr,
    /// The ports of --pod-bridge-interface are pods' links, too
    #[value(name = "BridgeInterface")]
    BridgeInterface,
    /// Links with --pod-interface-name-prefix are pods', too
    #[value(name = "InterfaceNamePrefix")]
    InterfaceNamePrefix,
}

impl Args {
    /// Runs the agent.
    pub fn run(self) -> Result<()> {
        let filter = EnvFilter::try_from_env("PORTAL_LOG").unwrap_or_else(|_| "info".into());
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
        let settings = self.resolve()?;
        // KP-150: without the agent the node's Services stand still, so others go first. Of no use where
        // it is forbidden.
        let _ = fs::write("/proc/self/oom_score_adj", "-999");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(run(settings))
    }

    fn resolve(self) -> Result<Settings> {
        let masquerade_except = if self.masquerade_pods {
            self.cluster_cidr.iter().chain(&self.masquerade_except).copied().collect()
        } else {
            BTreeSet::new()
        };
        let interfaces = self.interfaces();
        let sizes = self.sizes()?;
        let node = node_name(self.hostname_override.clone())?;
        let config = self.config(&node);
        let cgroup_root = match self.cgroup_root {
            Some(root) => Some(root),
            None if self.socket_lb.is_on() => Some(probe::cgroup2_mount()?),
            None => None,
        };
        Ok(Settings {
            node,
            config,
            algorithm: self.lb_algorithm,
            source: match self.manifests {
                Some(folder) => Source::Manifests(folder),
                None => Source::Api(ApiServer {
                    kubeconfig: self.kubeconfig,
                    url: self.master.filter(|url| !url.is_empty()),
                }),
            },
            kernel: Options {
                bpffs_root: self.place.bpffs_root,
                cgroup_root,
                socket_lb: self.socket_lb,
                tc: self.tc,
                xdp: self.xdp,
                sizes,
                lifetimes: Lifetimes {
                    syn: self.tcp_timeout_syn,
                    tcp: self.conntrack_tcp_timeout_established,
                    half_closed: self.conntrack_tcp_timeout_close_wait,
                    hold: self.tcp_timeout_port,
                    udp: self.conntrack_udp_timeout,
                    udp_stream: self.conntrack_udp_timeout_stream,
                },
                takeover_grace: self.takeover_grace,
                masquerade_ports: self.masquerade_ports,
                trace: self.trace,
                masquerade_all: self.masquerade_all,
                masquerade_pods: self.masquerade_pods,
                short_cut: self.short_cut == ShortCuts::Auto,
                // It is made when all else is known to be right.
                catch_all: 0,
                syn_guard: self.syn_guard,
                vip_ping: self.vip_ping,
                cluster_cidrs: self.cluster_cidr,
            },
            masquerade_except,
            catches: self.catch_all,
            interfaces,
            host_ports: self.host_ports,
            node_ports: node_ports(&self.nodeport_addresses)?,
            healthz: address("--healthz-bind-address", &self.healthz_bind_address)?,
            metrics: address("--metrics-bind-address", &self.metrics_bind_address)?,
        })
    }
}

impl Args {
    /// How much the tables hold.
    fn sizes(&self) -> Result<Sizes> {
        let sizes = match self.table_size {
            TableSize::Small => Sizes::SMALL,
            TableSize::Default => Sizes::DEFAULT,
            TableSize::Large => Sizes::LARGE,
        };
        let flows = self.max_flows.unwrap_or(sizes.flows);
        let embryos = self.max_embryos.unwrap_or(sizes.embryos);
        for (flag, records) in [("--max-flows", flows), ("--max-embryos", embryos)] {
            anyhow::ensure!(
                (MIN_RECORDS..=MAX_RECORDS).contains(&records),
                "{flag}={records}: a table holds {MIN_RECORDS} to {MAX_RECORDS} records, two for each flow"
            );
        }
        Ok(Sizes { flows, embryos, ..sizes })
    }

    /// What /configz tells: kube-proxy's fields as far as they mean something here, and our own.
    fn config(&self, node: &str) -> Value {
        let name = |value: &dyn Fn() -> Option<PossibleValue>| {
            value().map(|value| value.get_name().to_owned())
        };
        let list =
            |ranges: &[IpNet]| -> Vec<String> { ranges.iter().map(ToString::to_string).collect() };
        json!({
            "kubeproxy.config.k8s.io": {
                "kind": "KubeProxyConfiguration",
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "mode": "portal",
                "hostnameOverride": node,
                "clusterCIDR": list(&self.cluster_cidr).join(","),
                "detectLocalMode": name(&|| self.detect_local_mode.to_possible_value()),
                "detectLocal": {
                    "bridgeInterface": self.pod_bridge_interface,
                    "interfaceNamePrefix": self.pod_interface_name_prefix,
                },
                "nodePortAddresses": self.nodeport_addresses,
                "metricsBindAddress": self.metrics_bind_address,
                "healthzBindAddress": self.healthz_bind_address,
            },
            "portal.dev": {
                "lbAlgorithm": self.lb_algorithm.label(),
                "socketLB": name(&|| self.socket_lb.to_possible_value()),
                "tc": name(&|| self.tc.to_possible_value()),
                "synGuard": self.syn_guard,
                "catchAll": self.catch_all,
                "shortCut": name(&|| self.short_cut.to_possible_value()),
                "hostPorts": self.host_ports,
                "vipPing": self.vip_ping,
                "masqueradeAll": self.masquerade_all,
                "masqueradePods": self.masquerade_pods,
                "masqueradeExcept": list(&self.masquerade_except),
                "tableSize": name(&|| self.table_size.to_possible_value()),
                "maxFlows": self.max_flows,
                "maxEmbryos": self.max_embryos,
            },
        })
    }

    /// What links are for: --interfaces first, then what the detection of pods says.
    fn interfaces(&self) -> Vec<Rule> {
        let pods = match self.detect_local_mode {
            DetectLocalMode::BridgeInterface => {
                self.pod_bridge_interface.clone().map(Pattern::PortsOf)
            }
            DetectLocalMode::InterfaceNamePrefix => {
                self.pod_interface_name_prefix.clone().map(Pattern::Prefix)
            }
            DetectLocalMode::ClusterCidr | DetectLocalMode::NodeCidr => None,
        };
        let pods = pods.map(|links| Rule { role: Role::Pod, links });
        self.interfaces.iter().cloned().chain(pods).collect()
    }
}

/// A [`lifetime`], or none.
fn grace(text: &str) -> Result<u32, String> {
    if matches!(text, "0" | "0s") { Ok(0) } else { lifetime(text) }
}

/// A time as Go and kube-proxy write it, in ticks.
fn lifetime(text: &str) -> Result<u32, String> {
    const LONGEST: u64 = 366 * 24 * 3600;
    let wrong = || "expected a time from a second to a year, as in 90s, 1h30m or 24h".to_owned();
    let time: jiff::SignedDuration = text.parse().map_err(|_| wrong())?;
    let seconds = u64::try_from(time.as_secs()).ok().filter(|s| (1..=LONGEST).contains(s));
    seconds.map(ticks).ok_or_else(wrong)
}

/// A range of ports that takes some flows.
fn ports(text: &str) -> Result<(u16, u16), String> {
    const FEWEST: u16 = 64;
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port > 0);
    let range = port(first).zip(port(last)).ok_or("expected two ports, as in 32768-65535")?;
    if range.1.checked_sub(range.0).is_none_or(|more| more < FEWEST - 1) {
        return Err(format!(
            "leaves too few ports, at least {FEWEST} are needed: the first must be the smaller one"
        ));
    }
    Ok(range)
}

fn algorithms() -> impl TypedValueParser<Value = Algorithm> {
    let known = |name: String| Algorithm::ALL.into_iter().find(|a| a.label() == name);
    PossibleValuesParser::new(Algorithm::ALL.map(Algorithm::label))
        .map(move |name| known(name).expect("a possible value"))
}

fn range(text: &str) -> Result<IpNet, String> {
    parse_range(text).ok_or_else(|| "expected a range of addresses, as in 10.0.0.0/8".to_owned())
}

fn node_ports(given: &[String]) -> Result<NodePortAddresses> {
    match given {
        [] => Ok(NodePortAddresses::Primary),
        [word] if word == "primary" => Ok(NodePortAddresses::Primary),
        ranges => {
            let ranges = ranges.iter().map(|text| range(text).map_err(|error| (text, error)));
            let ranges = ranges.collect::<Result<_, _>>().map_err(|(text, error)| {
                anyhow::anyhow!("--nodeport-addresses: \"{text}\": {error}, or \"primary\" alone")
            })?;
            Ok(NodePortAddresses::Within(ranges))
        }
    }
}

/// The node's name, trimmed and in lower case (KP-139).
fn node_name(given: Option<String>) -> Result<String> {
    let name = match given {
        Some(name) => name,
        None => fs::read_to_string("/proc/sys/kernel/hostname")
            .context("cannot read the host's name; give the node's with --hostname-override")?,
    };
    Ok(name.trim().to_lowercase())
}

fn address(flag: &str, text: &str) -> Result<Option<SocketAddr>> {
    if text.is_empty() {
        return Ok(None);
    }
    let address = text.parse().with_context(|| {
        format!("{flag}: \"{text}\" is no address with a port, such as 127.0.0.1:10249")
    })?;
    Ok(Some(address))
}
