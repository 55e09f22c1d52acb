//! Read-only settings of a loaded program: frozen globals, fresh at every load, free to read.

use crate::map_type;

/// The unit of time in flow records: 2^30 ns of `CLOCK_MONOTONIC`, about 1.07 s.
///
/// A shift gives it, where seconds would cost the kernel a division for every packet.
pub const TICK_SHIFT: u32 = 30;

/// Ticks in `seconds`, rounded up.
#[expect(clippy::cast_possible_truncation, reason = "saturates before it could truncate")]
pub const fn ticks(seconds: u64) -> u32 {
    let ticks = seconds.saturating_mul(1_000_000_000).div_ceil(1 << TICK_SHIFT);
    if ticks > u32::MAX as u64 { u32::MAX } else { ticks as u32 }
}

/// Seconds in `ticks`, rounded down.
pub const fn seconds(ticks: u32) -> u64 {
    ((ticks as u64) << TICK_SHIFT) / 1_000_000_000
}

map_type! {
    /// A range of IPv4 addresses.
    pub struct Range4 {
        /// Its first address, in network byte order.
        pub address: [u8; 4],
        /// A one for each bit that counts; all zero if there is no range.
        pub mask: [u8; 4],
    }
}

map_type! {
    /// A range of IPv6 addresses.
    pub struct Range6 {
        /// Its first address, in network byte order.
        pub address: [u8; 16],
        /// A one for each bit that counts; all zero if there is no range.
        pub mask: [u8; 16],
    }
}

map_type! {
    /// What the agent tells its programs when it loads them.
    pub struct Settings {
        /// Seed of the flow hash; random per node, kept over restarts.
        pub seed: u32,
        /// 1: `bpf_ktime_get_coarse_ns` exists (5.11); 0: the precise clock is used.
        pub coarse_clock: u32,
        /// 1: `bpf_set_retval` exists for socket hooks (5.18), so that a refusal is ECONNREFUSED.
        pub socket_errno: u32,
        /// The cookie, in two halves, of the node's network namespace; 0 if it is not known.
        pub netns_cookie: [u32; 2],
        /// 1: the sockets of all network namespaces are translated; 0: only those of the node's.
        pub all_sockets: u32,
        /// Ticks that a flow lives without an answer.
        pub syn_timeout: u32,
        /// Ticks that an established TCP flow may be idle.
        pub tcp_timeout: u32,
        /// Ticks that a TCP flow may be idle after the first FIN.
        pub half_closed_timeout: u32,
        /// Ticks that a TCP flow lives after both FINs.
        pub closing_timeout: u32,
        /// Ticks that a UDP flow lives without an answer.
        pub udp_timeout: u32,
        /// Ticks that an answered UDP flow may be idle.
        pub udp_stream_timeout: u32,
        /// First source port that may replace a client's when two flows would be mixed up.
        pub first_port: u32,
        /// How many ports follow from `first_port` on. At least 1.
        pub port_count: u32,
        /// 1: ICMP echo to VIPs is answered.
        pub vip_ping: u32,
        /// 1: pods' flows to `ClusterIPs` are masqueraded too (KP-82).
        pub masquerade_all: u32,
        /// 1: what pods send out of the cluster is masqueraded.
        pub masquerade_pods: u32,
        /// 1: a client in the pods' ranges is no outsider (detectLocalMode `ClusterCIDR`, KP-84).
        pub local_by_cidr: u32,
        /// The pods' IPv4 range (`--cluster-cidr`), by which pods of other nodes are known; its mask is
        /// zero if it is not given.
        pub pods4: Range4,
        /// The pods' IPv6 range.
        pub pods6: Range6,
    }
}

impl Settings {
    /// The lifetimes of design section 4 (and kube-proxy's hour of `CLOSE_WAIT`, KP-116), no kernel
    /// feature assumed.
    pub const DEFAULT: Self = Self {
        seed: 0,
        coarse_clock: 0,
        socket_errno: 0,
        netns_cookie: [0; 2],
        all_sockets: 1,
        syn_timeout: ticks(60),
        tcp_timeout: ticks(6 * 3600),
        half_closed_timeout: ticks(3600),
        closing_timeout: ticks(10),
        udp_timeout: ticks(60),
        udp_stream_timeout: ticks(180),
        first_port: 61_000,
        port_count: 4_535,
        vip_ping: 1,
        masquerade_all: 0,
        masquerade_pods: 0,
        local_by_cidr: 1,
        pods4: Range4 { address: [0; 4], mask: [0; 4] },
        pods6: Range6 { address: [0; 16], mask: [0; 16] },
    };
}
