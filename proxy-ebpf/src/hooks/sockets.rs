//! cgroup socket hooks: connect, sendmsg, recvmsg and getpeername, for both families.
//!
//! An IPv6 socket that talks to a v4-mapped address (`::ffff:10.96.0.1`) comes to the IPv6 hook and
//! is led to the IPv4 tables.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use bytemuck::Zeroable;
use proxy_common::tables::{Asked, FlowKey, Side};
use proxy_common::{Addr4, Addr6, Family, Outcome, Port, V4, V6, proto};
use proxy_ebpf::datapath::Tables;
use proxy_ebpf::datapath::socket::{Act, Shown, Socket, restore, send};

use super::host;
use crate::counters;
use crate::maps::{Tables4, Tables6};

const ECONNREFUSED: i32 = 111;

/// The first three words of a v4-mapped IPv6 address.
const MAPPED: [u32; 3] = [0, 0, 0xffff_u32.to_be()];

macro_rules! hooks {
    ($($(#[$doc:meta])+ $name:ident($attach:ident): $run:ident;)+) => {$(
        $(#[$doc])+
        #[cgroup_sock_addr($attach)]
        pub fn $name(ctx: SockAddrContext) -> i32 {
            $run(ctx.sock_addr)
        }
    )+};
}

hooks! {
    /// An IPv4 socket connects.
    portal_connect4(connect4): connect4;
    /// An IPv6 socket connects.
    portal_connect6(connect6): connect6;
    /// An IPv4 UDP socket sends to an address.
    portal_sendmsg4(sendmsg4): send4;
    /// An IPv6 UDP socket sends to an address.
    portal_sendmsg6(sendmsg6): send6;
    /// An IPv4 UDP socket is told a datagram's source.
    portal_recvmsg4(recvmsg4): source4;
    /// An IPv6 UDP socket is told a datagram's source.
    portal_recvmsg6(recvmsg6): source6;
    /// An IPv4 socket asks for its peer.
    portal_getpeer4(getpeername4): peer4;
    /// An IPv6 socket asks for its peer.
    portal_getpeer6(getpeername6): peer6;
}

#[inline(always)]
fn connect4(ctx: *mut bpf_sock_addr) -> i32 {
    sent(&mut Ipv4 { ctx }, &Tables4, Act::Connect)
}

#[inline(always)]
fn connect6(ctx: *mut bpf_sock_addr) -> i32 {
    sent6(ctx, Act::Connect)
}

#[inline(always)]
fn send4(ctx: *mut bpf_sock_addr) -> i32 {
    sent(&mut Ipv4 { ctx }, &Tables4, Act::Send)
}

#[inline(always)]
fn send6(ctx: *mut bpf_sock_addr) -> i32 {
    sent6(ctx, Act::Send)
}

#[inline(always)]
fn sent6(ctx: *mut bpf_sock_addr, act: Act) -> i32 {
    if is_mapped(ctx) {
        sent(&mut Mapped { ctx }, &Tables4, act)
    } else {
        sent(&mut Ipv6 { ctx }, &Tables6, act)
    }
}

#[inline(always)]
fn source4(ctx: *mut bpf_sock_addr) -> i32 {
    restored(restore(&mut Ipv4 { ctx }, &Tables4, Shown::Source))
}

#[inline(always)]
fn source6(ctx: *mut bpf_sock_addr) -> i32 {
    restored6(ctx, Shown::Source)
}

#[inline(always)]
fn peer4(ctx: *mut bpf_sock_addr) -> i32 {
    restored(restore(&mut Ipv4 { ctx }, &Tables4, Shown::Peer))
}

#[inline(always)]
fn peer6(ctx: *mut bpf_sock_addr) -> i32 {
    restored6(ctx, Shown::Peer)
}

#[inline(always)]
fn restored6(ctx: *mut bpf_sock_addr, shown: Shown) -> i32 {
    restored(if is_mapped(ctx) {
        restore(&mut Mapped { ctx }, &Tables4, shown)
    } else {
        restore(&mut Ipv6 { ctx }, &Tables6, shown)
    })
}

/// Leads a call to a backend. 1 lets the call go on, 0 makes it fail.
#[inline(always)]
fn sent<F: Family, S: Socket<F> + Loopback, T: Tables<F>>(
    socket: &mut S,
    tables: &T,
    act: Act,
) -> i32 {
    let outcome = send(socket, tables, act);
    if outcome == Outcome::NotService {
        return 1;
    }
    counters::count(outcome, 1);
    if outcome != Outcome::SocketRefused {
        return 1;
    }
    if tables.setting(|s| &s.socket_errno) != 0 {
        // SAFETY: the helper only sets the call's result.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
        return 0;
    }
    if socket.protocol() == proto::TCP {
        // A kernel that can't be told the error would say that the call is not permitted. This place
        // refuses every connection.
        socket.set_loopback();
        return 1;
    }
    0
}

/// An address that can be replaced by the loopback's, at port 0.
trait Loopback {
    fn set_loopback(&mut self);
}

impl Loopback for Ipv4 {
    #[inline(always)]
    fn set_loopback(&mut self) {
        self.set_address(Addr4 { octets: [127, 0, 0, 1] }, Port::new(0));
    }
}

impl Loopback for Mapped {
    #[inline(always)]
    fn set_loopback(&mut self) {
        self.set_address(Addr4 { octets: [127, 0, 0, 1] }, Port::new(0));
    }
}

impl Loopback for Ipv6 {
    #[inline(always)]
    fn set_loopback(&mut self) {
        let mut octets = [0; 16];
        octets[15] = 1;
        self.set_address(Addr6 { octets }, Port::new(0));
    }
}

/// These hooks may not refuse: the kernel demands a 1.
#[inline(always)]
fn restored(outcome: Outcome) -> i32 {
    if outcome == Outcome::SocketRestored {
        counters::count(outcome, 1);
    }
    1
}

#[inline(always)]
fn is_mapped(ctx: *mut bpf_sock_addr) -> bool {
    // SAFETY: the context is the kernel's and outlives the program; words are read one by one, as the
    // verifier demands.
    unsafe {
        (*ctx).user_ip6[0] == MAPPED[0]
            && (*ctx).user_ip6[1] == MAPPED[1]
            && (*ctx).user_ip6[2] == MAPPED[2]
    }
}

/// An IPv4 socket's address.
struct Ipv4 {
    ctx: *mut bpf_sock_addr,
}

/// A v4-mapped address of an IPv6 socket.
struct Mapped {
    ctx: *mut bpf_sock_addr,
}

/// An IPv6 socket's address.
struct Ipv6 {
    ctx: *mut bpf_sock_addr,
}

impl Ipv4 {
    #[inline(always)]
    fn read(ctx: *mut bpf_sock_addr) -> Addr4 {
        // SAFETY: the context is the kernel's and outlives the program.
        Addr4 { octets: unsafe { (*ctx).user_ip4 }.to_ne_bytes() }
    }

    #[inline(always)]
    fn write(ctx: *mut bpf_sock_addr, address: Addr4) {
        // SAFETY: the hook may change the address.
        unsafe { (*ctx).user_ip4 = u32::from_ne_bytes(address.octets) };
    }
}

impl Mapped {
    #[inline(always)]
    fn read(ctx: *mut bpf_sock_addr) -> Addr4 {
        // SAFETY: the context is the kernel's and outlives the program.
        Addr4 { octets: unsafe { (*ctx).user_ip6[3] }.to_ne_bytes() }
    }

    #[inline(always)]
    fn write(ctx: *mut bpf_sock_addr, address: Addr4) {
        // SAFETY: the hook may change the address. The other words stay those of a mapped address.
        unsafe { (*ctx).user_ip6[3] = u32::from_ne_bytes(address.octets) };
    }
}

impl Ipv6 {
    #[inline(always)]
    fn read(ctx: *mut bpf_sock_addr) -> Addr6 {
        // SAFETY: the context is the kernel's and outlives the program; words are read one by one, as
        // the verifier demands.
        let words = unsafe {
            [(*ctx).user_ip6[0], (*ctx).user_ip6[1], (*ctx).user_ip6[2], (*ctx).user_ip6[3]]
        };
        bytemuck::cast(words)
    }

    #[inline(always)]
    fn write(ctx: *mut bpf_sock_addr, address: Addr6) {
        let words: [u32; 4] = bytemuck::cast(address);
        // SAFETY: the hook may change the address, word by word.
        unsafe {
            (*ctx).user_ip6[0] = words[0];
            (*ctx).user_ip6[1] = words[1];
            (*ctx).user_ip6[2] = words[2];
            (*ctx).user_ip6[3] = words[3];
        }
    }
}

macro_rules! socket {
    ($view:ident, $family:ty, $tables:ident) => {
        impl Socket<$family> for $view {
            #[inline(always)]
            fn address(&self) -> (<$family as Family>::Addr, Port) {
                // SAFETY: the context is the kernel's; the port is in the low half, in network order.
                let port = unsafe { (*self.ctx).user_port } as u16;
                (Self::read(self.ctx), Port { octets: port.to_ne_bytes() })
            }

            #[inline(always)]
            fn set_address(&mut self, address: <$family as Family>::Addr, port: Port) {
                Self::write(self.ctx, address);
                // SAFETY: the hook may change the port.
                unsafe { (*self.ctx).user_port = u32::from(port.word()) };
            }

            #[inline(always)]
            fn protocol(&self) -> u8 {
                // SAFETY: the context is the kernel's and outlives the program.
                unsafe { (*self.ctx).protocol as u8 }
            }

            #[inline(always)]
            fn cookie(&self) -> u64 {
                // SAFETY: the helper only reads, and makes up the cookie at first use.
                unsafe { bpf_get_socket_cookie(self.ctx.cast()) }
            }

            #[inline(always)]
            fn netns_cookie(&self) -> u64 {
                // SAFETY: the helper only reads.
                unsafe { bpf_get_netns_cookie(self.ctx.cast()) }
            }

            #[inline(always)]
            fn initial_cookie(&self) -> u64 {
                // SAFETY: as above; without a context it tells of the first namespace.
                unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) }
            }

            #[inline(always)]
            fn asked(&self) -> Option<Asked<$family>> {
                $tables.asked(&SockAddrContext::new(self.ctx))
            }

            #[inline(always)]
            fn keep(&mut self, asked: &Asked<$family>) -> bool {
                $tables.keep(&SockAddrContext::new(self.ctx), asked)
            }

            #[inline(always)]
            fn is_bound(&self) -> bool {
                let nobody = (<$family as Family>::Addr::zeroed(), Port::new(0));
                let key =
                    FlowKey::<$family>::new(nobody, self.address(), self.protocol(), Side::Ingress);
                host::listens(self.ctx.cast(), &key)
            }
        }
    };
}

socket!(Ipv4, V4, Tables4);
socket!(Mapped, V4, Tables4);
socket!(Ipv6, V6, Tables6);
