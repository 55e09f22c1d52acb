//! Read-only settings of a loaded program: frozen globals, fresh at every load, free to read.

use crate::tables::State;
use crate::{map_type, proto};

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

/// What is `rate` in a second, in a tick.
#[expect(clippy::cast_possible_truncation, reason = "saturates before it could truncate")]
pub const fn per_tick(rate: u32) -> u32 {
    let count = ((rate as u64) << TICK_SHIFT) / 1_000_000_000;
    if count > u32::MAX as u64 { u32::MAX } else { count as u32 }
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
    /// How long flows live, in ticks.
    pub struct Lifetimes {
        /// A TCP flow whose client has not shown yet that it hears the backend.
        pub syn: u32,
        /// An idle TCP connection.
        pub tcp: u32,
        /// The same after the first FIN.
        pub half_closed: u32,
        /// The source port of a TCP flow that has ended: as long as its backend may have the connection
        /// in `TIME_WAIT`.
        pub hold: u32,
        /// A UDP flow that is no stream yet.
        pub udp: u32,
        /// An idle UDP stream: the client has sent again after an answer.
        pub udp_stream: u32,
    }
}

impl Lifetimes {
    /// netfilter's (KP-116), and kube-proxy's hour of `CLOSE_WAIT`.
    pub const DEFAULT: Self = Self {
        syn: ticks(60),
        tcp: ticks(24 * 3600),
        half_closed: ticks(3600),
        hold: ticks(60),
        udp: ticks(30),
        udp_stream: ticks(180),
    };

    /// How many ticks a direction in that state may be idle.
    #[inline(always)]
    pub const fn of(&self, number: u8, state: State) -> &u32 {
        match (number == proto::TCP, state) {
            (true, State::Established | State::Revived) => &self.tcp,
            (true, State::Finished) => &self.half_closed,
            (true, _) => &self.syn,
            (false, State::Established | State::Revived) => &self.udp_stream,
            (false, _) => &self.udp,
        }
    }
}

/// How far source ports that are handed out in turn are from each other. A prime, so that all have their turn if
/// their number is no multiple of it.
pub const PORT_STRIDE: u32 = 12_347;

map_type! {
    /// How the programs tell the time: by the kernel's count of timer interrupts, in one load.
    pub struct Clock {
        /// How long a jiffy is, in nanoseconds; 0: the precise clock is used.
        pub jiffy: u32,
        /// What is added to the nanoseconds of all jiffies for those of `CLOCK_MONOTONIC`, in two halves. Wraps.
        pub offset: [u32; 2],
    }
}

impl Clock {
    /// The precise clock.
    pub const PRECISE: Self = Self { jiffy: 0, offset: [0; 2] };

    /// By jiffies of so many nanoseconds.
    pub const fn new(jiffy: u32, offset: u64) -> Self {
        let (low, high) = (offset & 0xffff_ffff, offset >> 32);
        #[expect(clippy::cast_possible_truncation, reason = "halves")]
        let offset = [low as u32, high as u32];
        Self { jiffy, offset }
    }

    /// The time in nanoseconds when there were so many jiffies. Wraps.
    #[inline(always)]
    pub const fn time(self, jiffies: u64) -> u64 {
        let [low, high] = self.offset;
        let offset = low as u64 | (high as u64) << 32;
        jiffies.wrapping_mul(self.jiffy as u64).wrapping_add(offset)
    }
}

map_type! {
    /// Against floods of new connections, at XDP.
    pub struct Guard {
        /// How many TCP flows may begin in a tick, as one CPU sees them come in, before clients are asked to show that their
        /// address is their own; 0: they never are.
        pub limit: u32,
        /// What challenges are made with; fresh with each agent.
        pub key: [u32; 4],
    }
}

map_type! {
    /// What the agent tells its programs when it loads them.
    pub struct Settings {
        /// Seed of the flow hash; random per node, kept over restarts.
        pub seed: u32,
        /// How the programs tell the time.
        pub clock: Clock,
        /// 1: `bpf_set_retval` exists for socket hooks (5.18), so that a refusal is ECONNREFUSED.
        pub socket_errno: u32,
        /// 1: `bpf_l4_csum_replace` knows `BPF_F_IPV6` (6.16, and some stable kernels before).
        pub ipv6_sums: u32,
        /// How the node's own network namespace is known: [`Settings::BY_COOKIE`] and its like.
        pub netns: u32,
        /// The cookie, in two halves, of the node's network namespace; 0 if it is not known.
        pub netns_cookie: [u32; 2],
        /// 1: the sockets of all network namespaces are translated; 0: only those of the node's.
        pub all_sockets: u32,
        /// How long flows live.
        pub lifetimes: Lifetimes,
        /// First source port that may replace a client's when two flows would be mixed up.
        pub first_port: u32,
        /// How many ports follow from `first_port` on. At least 1, and no multiple of [`PORT_STRIDE`].
        pub port_count: u32,
        /// How many CPUs there may be.
        pub cpus: u32,
        /// 1: ICMP echo to `ClusterIPs` is answered.
        pub vip_ping: u32,
        /// Until this tick TCP segments to VIPs in the middle of connections that nobody here knows are another proxy's
        /// before; 0: there was none.
        pub takeover_until: u32,
        /// 1: pods' flows to `ClusterIPs` are masqueraded too (KP-82).
        pub masquerade_all: u32,
        /// 1: what pods send out of the cluster is masqueraded.
        pub masquerade_pods: u32,
        /// 1: flows may take a short cut past the host stack.
        pub short_cut: u32,
        /// Index of the catch-all link, by which packets come in again that are led to backends where they leave; 0: none are.
        pub catch_all: u32,
        /// Against floods of new connections.
        pub guard: Guard,
        /// The pods' IPv4 range (`--cluster-cidr`), by which pods of other nodes are known; its mask is
        /// zero if it is not given.
        pub pods4: Range4,
        /// The pods' IPv6 range.
        pub pods6: Range6,
    }
}

impl Settings {
    /// The node's namespace is not known: no socket is the node's own.
    pub const UNKNOWN: u32 = 0;
    /// The node's namespace is the one with the cookie.
    pub const BY_COOKIE: u32 = 1;
    /// The node's namespace is the machine's first one.
    pub const INITIAL: u32 = 2;

    /// No kernel feature assumed.
    pub const DEFAULT: Self = Self {
        seed: 0,
        clock: Clock::PRECISE,
        socket_errno: 0,
        ipv6_sums: 0,
        netns: Self::UNKNOWN,
        netns_cookie: [0; 2],
        all_sockets: 1,
        lifetimes: Lifetimes::DEFAULT,
        first_port: 32_768,
        port_count: 32_768,
        cpus: 1,
        vip_ping: 1,
        takeover_until: 0,
        masquerade_all: 0,
        masquerade_pods: 0,
        short_cut: 0,
        catch_all: 0,
        guard: Guard { limit: 0, key: [0; 4] },
        pods4: Range4 { address: [0; 4], mask: [0; 4] },
        pods6: Range6 { address: [0; 16], mask: [0; 16] },
    };
}
