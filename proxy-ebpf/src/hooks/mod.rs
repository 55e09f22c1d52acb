//! The hooks: each turns a context into a view, calls one story, and turns the named outcome into the
//! kernel's code in one exhaustive match. They decide nothing.
//!
//! | program | attach point | story |
//! |---|---|---|
//! | `portal_ingress` | tc ingress of a pod's host-side link | `datapath::fast::ingress` |
//! | `portal_uplink` | tc ingress of an uplink | `datapath::fast::ingress` |
//! | `portal_egress` | tc egress of pods' links | `datapath::fast::egress` |
//! | `portal_upegress` | tc egress of uplinks | `datapath::fast::egress` |
//! | `portal_last`, `portal_uplast` | the same as these two, behind the programs of others | as above |
//! | `portal_l3uplink`, `portal_l3egress` | the same of an uplink without Ethernet headers | as above |
//! | `portal_relay` | XDP of uplinks | `datapath::relay` |
//! | `portal_pod4` and its like | called by these, or by each other | `datapath::tell` |
//! | `portal_connect4/6` | cgroup connect | `datapath::socket::send` |
//! | `portal_sendmsg4/6` | cgroup sendmsg (UDP) | `datapath::socket::send` |
//! | `portal_recvmsg4/6` | cgroup recvmsg (UDP) | `datapath::socket::restore` |
//! | `portal_getpeer4/6` | cgroup getpeername | `datapath::socket::restore` |

mod host;
mod raw;
mod relay;
mod skb;
mod sockets;
mod trace;
mod traffic;
mod window;
